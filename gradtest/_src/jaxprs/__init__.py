"""The one room that knows JAX's internals, a file for each kind of them.

Everything else asks these functions, so a change of JAX's internals is mended here.
Checked on jax 0.10.2 and 0.12.0; where they differ:

* `scan` counts its constants and carries by `num_consts` and `num_carry` on 0.10, by
  the lengths of the flat tree `ft_in` on 0.12;
* a closed program is a `ClosedJaxpr` around a `Jaxpr` on 0.10; on 0.12 there is one
  `Jaxpr` class, which holds its own constants;
* `custom_root` is a `custom_jvp` function on 0.10, a high-level primitive on 0.12,
  which says itself what it stands for (`expand`).

`kernels` has notes of its own.
"""

from gradtest._src.jaxprs import kernels as kernels
from gradtest._src.jaxprs.axes import devices_cut_to_one as devices_cut_to_one
from gradtest._src.jaxprs.axes import free_axes as free_axes
from gradtest._src.jaxprs.breaking import BoundRule as BoundRule
from gradtest._src.jaxprs.breaking import in_the_name_of as in_the_name_of
from gradtest._src.jaxprs.breaking import outside_of_traces as outside_of_traces
from gradtest._src.jaxprs.breaking import rules_met as rules_met
from gradtest._src.jaxprs.breaking import wanting as wanting
from gradtest._src.jaxprs.holders import Eqn as Eqn
from gradtest._src.jaxprs.holders import Jaxpr as Jaxpr
from gradtest._src.jaxprs.holders import LinearSolve as LinearSolve
from gradtest._src.jaxprs.holders import Scan as Scan
from gradtest._src.jaxprs.holders import ShardMap as ShardMap
from gradtest._src.jaxprs.holders import While as While
from gradtest._src.jaxprs.holders import read_linear_solve as read_linear_solve
from gradtest._src.jaxprs.holders import read_scan as read_scan
from gradtest._src.jaxprs.holders import read_shard_map as read_shard_map
from gradtest._src.jaxprs.holders import read_while as read_while
from gradtest._src.jaxprs.holders import solver_const_slots as solver_const_slots
from gradtest._src.jaxprs.lines import Place as Place
from gradtest._src.jaxprs.lines import call_site as call_site
from gradtest._src.jaxprs.lines import calls_library as calls_library
from gradtest._src.jaxprs.lines import hand_written_lines as hand_written_lines
from gradtest._src.jaxprs.lines import is_of_library as is_of_library
from gradtest._src.jaxprs.lines import users_place as users_place
from gradtest._src.jaxprs.opening import differentiates as differentiates
from gradtest._src.jaxprs.opening import rules_opened as rules_opened
from gradtest._src.jaxprs.processes import Job as Job
from gradtest._src.jaxprs.processes import StoreError as StoreError
from gradtest._src.jaxprs.processes import current_job as current_job
from gradtest._src.jaxprs.programs import CALLBACKS as CALLBACKS
from gradtest._src.jaxprs.programs import CALLS as CALLS
from gradtest._src.jaxprs.programs import COMPILED as COMPILED
from gradtest._src.jaxprs.programs import CUSTOM_RULES as CUSTOM_RULES
from gradtest._src.jaxprs.programs import HIGH_PRIMITIVE as HIGH_PRIMITIVE
from gradtest._src.jaxprs.programs import LINEAR_CALL as LINEAR_CALL
from gradtest._src.jaxprs.programs import LINEAR_SOLVE as LINEAR_SOLVE
from gradtest._src.jaxprs.programs import NO_FORWARD_RULE as NO_FORWARD_RULE
from gradtest._src.jaxprs.programs import SAMPLERS as SAMPLERS
from gradtest._src.jaxprs.programs import STOP_GRADIENT as STOP_GRADIENT
from gradtest._src.jaxprs.programs import WITH_SCALAR_PROGRAM as WITH_SCALAR_PROGRAM
from gradtest._src.jaxprs.programs import Body as Body
from gradtest._src.jaxprs.programs import bind as bind
from gradtest._src.jaxprs.programs import computes_in_half as computes_in_half
from gradtest._src.jaxprs.programs import entered as entered
from gradtest._src.jaxprs.programs import equation_at as equation_at
from gradtest._src.jaxprs.programs import expand_all as expand_all
from gradtest._src.jaxprs.programs import fits_together as fits_together
from gradtest._src.jaxprs.programs import half_literals as half_literals
from gradtest._src.jaxprs.programs import has_loop_on_floats as has_loop_on_floats
from gradtest._src.jaxprs.programs import has_side_effects as has_side_effects
from gradtest._src.jaxprs.programs import is_floating as is_floating
from gradtest._src.jaxprs.programs import is_literal as is_literal
from gradtest._src.jaxprs.programs import is_program as is_program
from gradtest._src.jaxprs.programs import mesh_devices as mesh_devices
from gradtest._src.jaxprs.programs import narrows as narrows
from gradtest._src.jaxprs.programs import nested_consts as nested_consts
from gradtest._src.jaxprs.programs import open_body as open_body
from gradtest._src.jaxprs.programs import operand_types as operand_types
from gradtest._src.jaxprs.programs import primitives as primitives
from gradtest._src.jaxprs.programs import programs_in as programs_in
from gradtest._src.jaxprs.programs import result_types as result_types
from gradtest._src.jaxprs.programs import rule_free_program as rule_free_program
from gradtest._src.jaxprs.programs import same_inside as same_inside
from gradtest._src.jaxprs.programs import stray_values as stray_values
from gradtest._src.jaxprs.programs import subprograms as subprograms
from gradtest._src.jaxprs.programs import vma as vma
from gradtest._src.jaxprs.programs import walk as walk
from gradtest._src.jaxprs.scopes import is_inner as is_inner
from gradtest._src.jaxprs.scopes import scope as scope
from gradtest._src.jaxprs.scopes import scope_names as scope_names
from gradtest._src.jaxprs.sources import Batch as Batch
from gradtest._src.jaxprs.sources import RuleLayout as RuleLayout
from gradtest._src.jaxprs.sources import RuleSource as RuleSource
from gradtest._src.jaxprs.sources import captured as captured
from gradtest._src.jaxprs.sources import closed_over as closed_over
from gradtest._src.jaxprs.sources import is_library as is_library
from gradtest._src.jaxprs.sources import is_users as is_users
from gradtest._src.jaxprs.sources import read_rule as read_rule
from gradtest._src.jaxprs.sources import rule_layout as rule_layout
from gradtest._src.jaxprs.sources import rule_out_tree as rule_out_tree
from gradtest._src.jaxprs.sources import source_of as source_of
from gradtest._src.jaxprs.wide_call import wide_call as wide_call
