// The project's operators for OpenVINO: what a graph's nodes become, and the library's entry.

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>

#include "../block_matmul/kernel.hpp"
#include "../cascade_attention/paged.hpp"

namespace d2sd {

// What both have in common; settings are a graph's attributes.
template <typename Self, typename Settings>
class Operator : public ov::op::Op {
public:
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto copy = std::make_shared<Self>();
        copy->m = m;
        copy->set_arguments(inputs);
        copy->constructor_validate_and_infer_types();
        return copy;
    }

    bool has_evaluate() const override { return true; }

protected:
    Settings m;
};

struct Form {
    std::vector<int64_t> columns;  // of each matrix
    int64_t bits = 4, block = 32;
    bool half = true;
    std::string of = "x";  // or "norm", "gate": what the rows are made of
    double epsilon = 0;    // of the norm
    bool adds = false;     // to a last input
};

struct Heads {
    int64_t heads = 1, kv_heads = 1;
    double scale = 1.0;
    bool turns = false;  // queries and keys, by cosines and sines (RoPE)
};

// Inputs: x [.., K] f32; the norm's weights [K], or a gate like x; packed matrices of one form, bytes; what the product is added to,
// where there is one matrix. An output for each matrix.
class BlockMatMul : public Operator<BlockMatMul, Form> {
public:
    OPENVINO_OP("BlockMatMul", "d2sd");

    void validate_and_infer_types() override {
        auto shape = get_input_partial_shape(0);
        for (size_t i = 0; i < m.columns.size(); i++) {
            shape[shape.size() - 1] = m.columns[i];
            set_output_type(i, ov::element::f32, shape);
        }
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("columns", m.columns);
        visitor.on_attribute("bits", m.bits);
        visitor.on_attribute("block", m.block);
        visitor.on_attribute("half", m.half);
        visitor.on_attribute("of", m.of);
        visitor.on_attribute("epsilon", m.epsilon);
        visitor.on_attribute("adds", m.adds);
        return true;
    }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        ov::Shape shape = inputs[0].get_shape();
        const size_t depth = shape.back(), rows = inputs[0].get_size() / depth, first = m.of == "x" ? 1 : 2;
        const float *x = inputs[0].data<const float>(), *with = m.of == "x" ? nullptr : inputs[1].data<const float>();
        const float* before = m.adds ? inputs.back().data<const float>() : nullptr;
        const Given given{x, m.of == "norm" ? with : nullptr, m.of == "gate" ? with : nullptr, static_cast<float>(m.epsilon)};
        std::vector<Matrix> matrices;
        for (size_t i = 0; i < m.columns.size(); i++) {
            shape.back() = static_cast<size_t>(m.columns[i]);
            outputs[i].set_shape(shape);
            matrices.push_back({inputs[first + i].data<const uint8_t>(), shape.back(), outputs[i].data<float>(), before});
        }
        multiply(given, rows, depth, matrices, m.bits, m.block, m.half);
        return true;
    }
};

// Inputs: q [R, H · D], k, v [R, Hkv · D], what export/paged_graph.py tells of sequences and blocks, and cosines and sines
// [.., R, D], where queries and keys are to be turned by them. The pool, an input that may show no more than its first block, is
// written to; it holds f32, or, given as bytes, f16, or, as bytes with signs, pairs of bf16: OpenVINO would turn these into f32 in
// front of us. What is told may lie in
// larger buffers: sequences end where all rows are theirs.
class CascadeAttention : public Operator<CascadeAttention, Heads> {
public:
    OPENVINO_OP("CascadeAttention", "d2sd");

    void validate_and_infer_types() override { set_output_type(0, ov::element::f32, get_input_partial_shape(0)); }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("heads", m.heads);
        visitor.on_attribute("kv_heads", m.kv_heads);
        visitor.on_attribute("scale", m.scale);
        visitor.on_attribute("turns", m.turns);
        return true;
    }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        outputs[0].set_shape(inputs[0].get_shape());
        const auto kept = inputs[3].get_element_type();
        if (kept == ov::element::u8)
            attend_over<Half>(outputs, inputs);
#ifdef __AVX512VNNI__
        else if (kept == ov::element::i8)
            attend_over<Brief>(outputs, inputs);
#endif
        else
            attend_over<float>(outputs, inputs);
        return true;
    }

private:
    template <typename Stored>
    void attend_over(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
        const auto numbers = [&](size_t i) { return inputs[i].data<const int32_t>(); };
        Attention<Stored> a{};
        a.q = inputs[0].data<const float>(), a.k = inputs[1].data<const float>(), a.v = inputs[2].data<const float>();
        a.past_k = static_cast<Stored*>(const_cast<void*>(inputs[3].data()));
        a.past_v = static_cast<Stored*>(const_cast<void*>(inputs[4].data()));
        a.lengths = numbers(5), a.begins = numbers(6), a.blocks = numbers(7), a.block_begins = numbers(8);
        a.mask = inputs[9].data<const uint8_t>(), a.mask_begins = numbers(10);
        if (m.turns) a.cosines = inputs[11].data<const float>(), a.sines = inputs[12].data<const float>();
        const int32_t rows = static_cast<int32_t>(inputs[0].get_shape()[0]);
        while (a.begins[a.sequences] < rows) a.sequences++;
        a.heads = static_cast<size_t>(m.heads), a.kv_heads = static_cast<size_t>(m.kv_heads);
        a.dim = inputs[0].get_shape().back() / a.heads;
        a.scale = static_cast<float>(m.scale), a.out = outputs[0].data<float>();
        attention(a);
    }
};

}  // namespace d2sd

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<d2sd::BlockMatMul>>(),
                                                              std::make_shared<ov::OpExtension<d2sd::CascadeAttention>>()}));
