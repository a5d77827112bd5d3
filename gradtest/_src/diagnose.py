"""The causes that checks name: what they need of the package `diagnosis`."""

from gradtest._src.diagnosis.clues import FIT as FIT
from gradtest._src.diagnosis.clues import Scene as Scene
from gradtest._src.diagnosis.clues import all_entries as all_entries
from gradtest._src.diagnosis.clues import factor_between as factor_between
from gradtest._src.diagnosis.states import FAINT as FAINT
from gradtest._src.diagnosis.states import FORWARD_VALUE as FORWARD_VALUE
from gradtest._src.diagnosis.states import IMPURE as IMPURE
from gradtest._src.diagnosis.states import KINK as KINK
from gradtest._src.diagnosis.states import LOOSE_SOLVER as LOOSE_SOLVER
from gradtest._src.diagnosis.states import OFF_BRANCH as OFF_BRANCH
from gradtest._src.diagnosis.states import SAMPLER as SAMPLER
from gradtest._src.diagnosis.states import TIES as TIES
from gradtest._src.diagnosis.states import departs as departs
from gradtest._src.diagnosis.states import how_to_declare as how_to_declare
from gradtest._src.diagnosis.states import noisy as noisy
from gradtest._src.diagnosis.states import not_finite as not_finite
from gradtest._src.diagnosis.states import not_linear as not_linear
from gradtest._src.diagnosis.states import slope_cause as slope_cause
from gradtest._src.diagnosis.states import solver_residual as solver_residual
from gradtest._src.diagnosis.states import unstable as unstable
from gradtest._src.diagnosis.states import value_not_finite as value_not_finite
from gradtest._src.diagnosis.states import value_overflows as value_overflows
from gradtest._src.diagnosis.table import at_first_sight as at_first_sight
from gradtest._src.diagnosis.table import leaf_cause as leaf_cause
from gradtest._src.diagnosis.table import leaf_causes as leaf_causes
from gradtest._src.findings import Cause as Cause
