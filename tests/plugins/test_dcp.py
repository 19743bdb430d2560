"""``.metadata`` is pickled without torch.distributed.checkpoint, and is as if with it."""

import subprocess
import sys

BOTH_WAYS = """
import pickle, sys
from gptoss_convert.types import TensorSpec
from gptoss_plugins.megatron import metadata
from gptoss_plugins.megatron.metadata import Contents, Stored, StoredChunk, Tensor

at = Stored("__0_0.distcp", 64, 512)
chunks = (StoredChunk((0, 0), (2, 3), at), StoredChunk((2, 0), (2, 3), at))
contents = Contents({"a.weight": Tensor(TensorSpec((4, 3), "BF16"), chunks)}, {"a._extra_state": at})

def loaded():
    return [n for n in sys.modules if n.startswith("torch.distributed.checkpoint") or n == "sympy"]

import torch
before = loaded()
data = metadata.dump(contents)
assert loaded() == before == [], loaded()

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
read = pickle.loads(data)
assert type(read) is dcp.metadata.Metadata
assert read.storage_data[dcp.metadata.MetadataIndex("a.weight", (2, 0))] == _StorageInfo("__0_0.distcp", 64, 512)
assert metadata.dump(contents) == data
"""


def test_the_package_is_not_imported_and_nothing_differs() -> None:
    subprocess.run([sys.executable, "-c", BOTH_WAYS], check=True)
