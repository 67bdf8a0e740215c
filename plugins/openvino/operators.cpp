// The project's operators for OpenVINO: what a graph's nodes become, and the library's entry.

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>

#include "../block_matmul/kernel.hpp"
#include "../cascade_attention/paged.hpp"

namespace d2sd {

// Inputs: x [.., K] f32, and packed matrices of one form, bytes; an output for each.
class BlockMatMul : public ov::op::Op {
public:
    OPENVINO_OP("BlockMatMul", "d2sd");

    BlockMatMul() = default;

    void validate_and_infer_types() override {
        auto shape = get_input_partial_shape(0);
        for (size_t i = 0; i < m_columns.size(); i++) {
            shape[shape.size() - 1] = m_columns[i];
            set_output_type(i, ov::element::f32, shape);
        }
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto copy = std::make_shared<BlockMatMul>();
        copy->m_columns = m_columns, copy->m_bits = m_bits, copy->m_block = m_block, copy->m_half = m_half;
        copy->set_arguments(inputs);
        copy->constructor_validate_and_infer_types();
        return copy;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("columns", m_columns);
        visitor.on_attribute("bits", m_bits);
        visitor.on_attribute("block", m_block);
        visitor.on_attribute("half", m_half);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        ov::Shape shape = inputs[0].get_shape();
        const size_t depth = shape.back();
        std::vector<Matrix> matrices;
        for (size_t i = 0; i < m_columns.size(); i++) {
            shape.back() = static_cast<size_t>(m_columns[i]);
            outputs[i].set_shape(shape);
            matrices.push_back({inputs[i + 1].data<const uint8_t>(), shape.back(), outputs[i].data<float>()});
        }
        multiply(inputs[0].data<const float>(), inputs[0].get_size() / depth, depth, matrices, m_bits, m_block, m_half);
        return true;
    }

private:
    std::vector<int64_t> m_columns;  // of each matrix
    int64_t m_bits = 4, m_block = 32;
    bool m_half = true;
};

// Inputs: q [R, H · D], k, v [R, Hkv · D], and what export/paged_graph.py tells of sequences and blocks. The pool, an input that may
// show no more than its first block, is written to. What is told may lie in larger buffers: sequences end where all rows are theirs.
class CascadeAttention : public ov::op::Op {
public:
    OPENVINO_OP("CascadeAttention", "d2sd");

    CascadeAttention() = default;

    void validate_and_infer_types() override { set_output_type(0, ov::element::f32, get_input_partial_shape(0)); }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto copy = std::make_shared<CascadeAttention>();
        copy->m_heads = m_heads, copy->m_kv_heads = m_kv_heads, copy->m_scale = m_scale;
        copy->set_arguments(inputs);
        copy->constructor_validate_and_infer_types();
        return copy;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("heads", m_heads);
        visitor.on_attribute("kv_heads", m_kv_heads);
        visitor.on_attribute("scale", m_scale);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto numbers = [&](size_t i) { return inputs[i].data<const int32_t>(); };
        outputs[0].set_shape(inputs[0].get_shape());
        Attention a{};
        a.q = inputs[0].data<const float>(), a.k = inputs[1].data<const float>(), a.v = inputs[2].data<const float>();
        a.past_k = const_cast<float*>(inputs[3].data<const float>());
        a.past_v = const_cast<float*>(inputs[4].data<const float>());
        a.lengths = numbers(5), a.begins = numbers(6), a.blocks = numbers(7), a.block_begins = numbers(8);
        a.mask = inputs[9].data<const uint8_t>(), a.mask_begins = numbers(10);
        const int32_t rows = static_cast<int32_t>(inputs[0].get_shape()[0]);
        while (a.begins[a.sequences] < rows) a.sequences++;
        a.heads = static_cast<size_t>(m_heads), a.kv_heads = static_cast<size_t>(m_kv_heads);
        a.dim = inputs[3].get_shape().back();
        a.scale = static_cast<float>(m_scale), a.out = outputs[0].data<float>();
        attention(a);
        return true;
    }

private:
    int64_t m_heads = 1, m_kv_heads = 1;
    double m_scale = 1.0;
};

}  // namespace d2sd

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<d2sd::BlockMatMul>>(),
                                                              std::make_shared<ov::OpExtension<d2sd::CascadeAttention>>()}));
