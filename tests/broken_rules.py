"""The zoo: wrong custom rules, each beside its right twin, by kind of mistake.

`BROKEN_RULES` have the form of a rule and are wrong; `MALFORMED` do not even have the
form. Both are labelled with what an audit should say of them.
"""

from tests.zoo_contracts import CONTRACTS
from tests.zoo_layers import LAYERS
from tests.zoo_losses import LOSSES
from tests.zoo_malformed import MALFORMED_RULES
from tests.zoo_positions import POSITIONS
from tests.zoo_tangents import TANGENTS

BROKEN_RULES = (*LAYERS, *POSITIONS, *LOSSES, *CONTRACTS, *TANGENTS)
MALFORMED = MALFORMED_RULES
