"""The numbers of the format, and the scale rules, in words that every backend shares.

OCP Microscaling Formats (MX) v1.0: a block is 32 E2M1 codes in 16 bytes (element 2j is the low
nibble of byte j) that share one E8M0 scale byte ``s``; the value is ``e2m1 * 2**(s - 127)``, and
``s == 255`` is NaN. Every product is a bfloat16 (two significant bits, smallest magnitude 2**-128,
a bfloat16 subnormal), except that those past bfloat16's largest (s = 253 with codes 6 and 7,
s = 254 with codes 4 to 7) become infinite.
"""

from __future__ import annotations

from typing import Literal, get_args

BLOCK = 32  # values per scale
BYTES = 16  # packed bytes per block
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; bit 3 is the sign
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # ties go to the even code
BIAS = 127
NAN_SCALE = 255
LARGEST = 1.5 * 2.0**127  # the largest value that is a finite bfloat16 too
LARGEST_SCALE = 252  # of what is encoded: there code 7 is LARGEST, above it would be infinite
NAN_BITS = 0x7FC0  # the one bfloat16 NaN that decoding makes

# The scale byte of a block from its largest magnitude ``m * 2**n``, 1 <= m < 2:
# ``n - 2 + 127``, plus 1 where it says below, then clamped to 0..252 (magnitudes above LARGEST are
# cut down to that, so that nothing finite becomes infinite):
#   even      m >= 1.75: m rounded to one bit, ties up, would be 2 (least error, keeps its bytes)
#   floor     never (the OCP text); magnitudes above 6 * 2**(s - 127) are cut down to that
#   round_up  m > 1.5, so that nothing is ever cut
Rule = Literal["even", "floor", "round_up"]
RULES: tuple[Rule, ...] = get_args(Rule)

# A block whose source scale byte (the hint) is k above what the rules give: its codes at the
# hint, by its codes at the rule's scale, where the quotient by 2**k is on the grid. A block that
# is on the grid at all has its largest magnitude at code 6 or 7 by every rule, so k is 0 to 3. A
# finite block at 253 or 254 has codes up to 5 or 3, so it is on the grid at 252 too.
SHIFTED = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (0, None, 1, None, 2, 3, 4, 5),
    (0, None, None, None, 1, None, 2, 3),
    (0, None, None, None, None, None, 1, None),
)
