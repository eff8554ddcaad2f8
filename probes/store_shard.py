"""One shard of the feature store: a safetensors file that is whole or absent and carries its own checksum.

It holds `index` int64 [n], the positions in the split of the rows that it has (unreadable images are left out), and
`features` [n, D]. Its metadata name the range of positions that it covers and a sha256 over all the rest of the file.
Imports torch only to write and to map.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
"""Suffix of files that are being written; their names begin with a dot."""
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ALIGNMENT = 64
_BLOCK = 1 << 20
_CHANGED = "its bytes do not have the checksum that was stored with them"


class DamagedShard(ValueError):
    """A shard whose content is not what was written; the message names it and says what to do."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(
            f"{path} is damaged ({problem}); remove it with `python -m probes.features gc {path.parents[2]} --damaged "
            "--apply`, and its rows are extracted again at the next use"
        )


@dataclass(frozen=True)
class Shard:
    """What the header of a shard says."""

    path: Path
    start: int
    """First position in the split that it covers."""
    stop: int
    """One past the last."""
    rows: int
    """Rows it has: stop - start less the unreadable images."""
    width: int
    """D."""
    dtype: str
    """"F32", "F16" or "BF16"."""
    sha256: str
    data_start: int
    """Byte at which `index` begins; `features` follow it."""

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.data_start + self.rows * (8 + self.width * ITEM_BYTES[self.dtype])


def write_shard(path: Path, features: torch.Tensor, index: torch.Tensor, start: int, stop: int) -> None:
    """Write a shard under a temporary name, bring it to the disk, and rename it.

    Args:
        path: its final name, `<entry>/<array>/<number>.safetensors`.
        features: [n, D] on the CPU.
        index: int64 [n], ascending.
        start: first position covered.
        stop: one past the last.

    Raises:
        OSError: it could not be written (a full disk); nothing of it remains.
    """
    import torch

    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[features.dtype]
    parts = [part.contiguous().flatten().view(torch.uint8).numpy() for part in (index, features)]
    rows, width = features.shape
    content = _layout(rows, width, dtype)
    digest = _start_digest(content, start, stop)
    for part in parts:
        digest.update(part)
    content["__metadata__"] = {"start": str(start), "stop": str(stop), "sha256": digest.hexdigest()}
    header = json.dumps(content).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with temporary.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for part in parts:
                stream.write(part.data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)}: a shard of features ({sum(part.nbytes for part in parts):,} bytes) "
            "could not be written; the shards finished before are kept, so make room (or set features.cache to another "
            "disk) and run the same command again",
            str(path),
        ) from error
    _sync_folder(path.parent)


def read_shard(path: Path) -> Shard:
    """The header of a shard, checked against the file's size.

    Raises:
        DamagedShard: it is no shard, or is longer or shorter than its header says.
        FileNotFoundError: no such file.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            content = json.loads(stream.read(length))
        metadata, features = content["__metadata__"], content["features"]
        rows, width = features["shape"]
        start, stop = int(metadata["start"]), int(metadata["stop"])
        shard = Shard(path, start, stop, rows, width, features["dtype"], metadata["sha256"], 8 + length)
        if set(content) != {"__metadata__", "index", "features"} or _layout(rows, width, shard.dtype) != {
            name: content[name] for name in ("index", "features")
        }:
            raise ValueError("its header describes no shard")
        if shard.nbytes != size or not 0 <= rows <= stop - start:
            raise ValueError(f"{size:,} bytes, expected {shard.nbytes:,} for {rows} rows")
    except (ValueError, KeyError, TypeError) as error:  # JSON and Unicode errors are ValueErrors
        raise DamagedShard(path, str(error) or type(error).__name__) from error
    return shard


def verify_shard(shard: Shard) -> None:
    """Compare a shard's bytes with its checksum.

    Raises:
        DamagedShard: they differ.
    """
    digest = _start_digest(_layout(shard.rows, shard.width, shard.dtype), shard.start, shard.stop)
    buffer = bytearray(_BLOCK)
    with shard.path.open("rb", buffering=0) as stream:
        stream.seek(shard.data_start)
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    if digest.hexdigest() != shard.sha256:
        raise DamagedShard(shard.path, _CHANGED)


def read_features(shard: Shard, target: memoryview, *, check: bool) -> None:
    """Read the features of a shard into memory and, on the way, compare its checksum.

    Args:
        shard: the shard.
        target: writable bytes, as many as the features have.
        check: whether to compare the checksum.

    Raises:
        DamagedShard: the checksum differs, or the file became shorter.
    """
    with shard.path.open("rb", buffering=0) as stream:
        stream.seek(shard.data_start + (0 if check else shard.rows * 8))
        digest = (
            _start_digest(_layout(shard.rows, shard.width, shard.dtype), shard.start, shard.stop) if check else None
        )
        if digest is not None:
            digest.update(stream.read(shard.rows * 8))
        done = 0
        while done < len(target):  # in blocks, so that they are hashed while they are in the processor's cache
            count = stream.readinto(target[done : done + _BLOCK])
            if not count:
                raise DamagedShard(shard.path, f"it ends after {done:,} of {len(target):,} bytes of features")
            if digest is not None:
                digest.update(target[done : done + count])
            done += count
    if digest is not None and digest.hexdigest() != shard.sha256:
        raise DamagedShard(shard.path, _CHANGED)


def map_shard(shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """The features [n, D] and index int64 [n] of a shard, mapped into memory: no byte is read yet.

    Writing to them changes this process's copy, never the file.
    """
    import torch

    # torch maps the file and closes it again: thousands of shards would use up the open files of a process.
    whole = torch.from_file(str(shard.path), shared=False, size=shard.nbytes, dtype=torch.uint8)
    split = shard.data_start + shard.rows * 8
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[shard.dtype]
    index = whole[shard.data_start : split].view(torch.int64)
    return whole[split:].view(dtype).view(shard.rows, shard.width), index


def _layout(rows: int, width: int, dtype: str) -> dict[str, Any]:
    """The tensors of a safetensors header: the index first, so that features of any width are aligned."""
    middle = rows * 8
    end = middle + rows * width * ITEM_BYTES[dtype]
    return {
        "index": {"dtype": "I64", "shape": [rows], "data_offsets": [0, middle]},
        "features": {"dtype": dtype, "shape": [rows, width], "data_offsets": [middle, end]},
    }


def _start_digest(content: dict[str, Any], start: int, stop: int) -> Any:
    return hashlib.sha256(json.dumps([content, start, stop], sort_keys=True).encode())


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
