"""GGUF files that come in shards, ``NAME-00001-of-00003.gguf``, joined into one: what reads GGUF reads one file."""

import hashlib
import re
import sys
from pathlib import Path

from export.config_fields import CheckpointError
from export.files import replacing

SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")


def join_shards(path: Path, cache: Path) -> Path:
    """The file itself, or if it is one of several shards, the file that they make up, kept in a cache.

    Raises:
        CheckpointError: a shard is missing or broken.
    """
    named = SHARD.fullmatch(path.name)
    if not named or named["count"] == "00001":
        return path
    count = int(named["count"])
    shards = [path.with_name(f"{named['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    for shard in shards:
        if not shard.exists():
            raise CheckpointError(f"target {path}: shard {shard.name} is missing")
    states = (shard.stat() for shard in shards)
    stamp = "-".join(f"{state.st_size:x}.{state.st_mtime_ns:x}" for state in states)
    joined = cache / f"{named['stem']}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.gguf"
    if joined.exists():
        return joined
    print(f"joining {count} shards of {named['stem']}, once", file=sys.stderr)
    try:
        with replacing(joined, shared=True) as partial:
            _write(shards, partial)
    except (ValueError, IndexError, KeyError) as error:  # the gguf library raises these for files that are not whole
        raise CheckpointError(f"target {path}: a shard cannot be read as GGUF ({' '.join(str(error).split())})") from None
    return joined


def _write(shards: list[Path], path: Path) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(shard) for shard in shards]
    fields = readers[0].fields
    writer = GGUFWriter(path, arch=fields["general.architecture"].contents())
    for name, field in fields.items():
        if name.startswith(("GGUF.", "split.")) or name == "general.architecture":
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
