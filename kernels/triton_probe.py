"""The smallest kernel there is: whether it can be lowered says whether any can."""

# Triton's language only looks like Python: a checker sees neither its constants nor its tensors.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def triton_double(x, y, SIZE: tl.constexpr):
    """Y = 2 x."""
    at = tl.arange(0, SIZE)
    tl.store(y + at, 2 * tl.load(x + at))
