"""Reading and writing checkpoints on disk: numpy and the standard library only (torch for pickles, when met).

`open_checkpoint` checks a folder or file whole and reads tensors by offset; `Staging` and `StagedFile` make a
destination appear whole or not at all; `ShardWriter` and `copy_side_files` fill it.
"""

from __future__ import annotations

from .formats import MANIFEST, SIDECAR
from .header import BITS, Shard, TensorInfo, build_shard, read_header
from .numeric import bits_dtype, is_float, to_bits, to_float32, to_float64
from .pipeline import Component, Pipeline, components, is_pipeline, open_pipeline
from .read import Checkpoint, open_checkpoint
from .staging import StagedFile, Staging, rename_noreplace, sweep
from .write import ShardWriter, check_destination, copy_file, copy_side_files, replacing, write_file

__all__ = [
    "BITS",
    "MANIFEST",
    "SIDECAR",
    "Checkpoint",
    "Component",
    "Pipeline",
    "Shard",
    "ShardWriter",
    "StagedFile",
    "Staging",
    "TensorInfo",
    "bits_dtype",
    "build_shard",
    "check_destination",
    "components",
    "copy_file",
    "copy_side_files",
    "is_float",
    "is_pipeline",
    "open_checkpoint",
    "open_pipeline",
    "read_header",
    "rename_noreplace",
    "replacing",
    "sweep",
    "to_bits",
    "to_float32",
    "to_float64",
    "write_file",
]
