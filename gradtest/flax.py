"""Assertions about Flax modules, Linen and NNX: needs Flax, and is imported by itself.

`import gradtest.flax` makes them; `import gradtest` alone does not import Flax.
"""

from gradtest._src.modules.agree import assert_grads_agree as assert_grads_agree
from gradtest._src.modules.flow import assert_grads_flow as assert_grads_flow
from gradtest._src.modules.grads import assert_module_grads as assert_module_grads
from gradtest._src.modules.stats import assert_stats_hold as assert_stats_hold
