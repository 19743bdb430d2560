"""For plugin authors: small checkpoints to try a family or a codec on, and the checks that matter.

>>> from gptoss_convert.testing import assert_codec, assert_roundtrip
>>> assert_roundtrip(my_family, my_config)  # doctest: +SKIP
>>> assert_codec(my_codec, TensorSpec((3, 64, 96), "BF16"))  # doctest: +SKIP
"""

from gptoss_convert.testing.codecs import assert_codec
from gptoss_convert.testing.families import (
    assert_roundtrip,
    distinct,
    hf_specs,
    make_tensors,
    write_hf_folder,
)

__all__ = [
    "assert_codec",
    "assert_roundtrip",
    "distinct",
    "hf_specs",
    "make_tensors",
    "write_hf_folder",
]
