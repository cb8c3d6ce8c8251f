"""The operators that stand for a form in a graph, one file a family.

All export, trace and deep-copy like any operator; exporters translate them to what their runtime
calls the same thing, or to the tensor.
"""

import torch

from laconic.forms.operators.grids import dequantize as dequantize
from laconic.forms.operators.grids import dynamic_quantize as dynamic_quantize
from laconic.forms.operators.grids import fake_levels as fake_levels
from laconic.forms.operators.grids import fake_quantize as fake_quantize
from laconic.forms.operators.grids import levels_ as levels_
from laconic.forms.operators.shared import combine as combine
from laconic.forms.operators.shared import hashed_ as hashed_
from laconic.forms.operators.shared import lookup as lookup
from laconic.forms.operators.shared import member as member
from laconic.forms.operators.shared import vectors_ as vectors_

FAKE_QUANTIZE = torch.ops.laconic.fake_quantize.default
DEQUANTIZE = torch.ops.laconic.dequantize.default
DYNAMIC_QUANTIZE = torch.ops.laconic.dynamic_quantize.default
FAKE_LEVELS = torch.ops.laconic.fake_levels.default
LEVELS = torch.ops.laconic.levels.default
LOOKUP = torch.ops.laconic.lookup.default
COMBINE = torch.ops.laconic.combine.default
VECTORS = torch.ops.laconic.vectors.default
HASHED = torch.ops.laconic.hashed.default
MEMBER = torch.ops.laconic.member.default
FAKES = (FAKE_QUANTIZE, FAKE_LEVELS)
"""What puts float values on a grid: in front of weights and of activations."""
STORED = (LEVELS, LOOKUP, COMBINE, VECTORS, HASHED)
"""What no runtime computes with: exported, it becomes the tensor it stands for."""
