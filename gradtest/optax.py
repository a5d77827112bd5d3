"""Optax's transformations under test: `import gradtest.optax`.

Needs optax; `import gradtest` alone does not.
"""

from gradtest._src.optimisers.accumulation import (
    assert_accumulated_grads_match as assert_accumulated_grads_match,
)
from gradtest._src.optimisers.clipping import (
    assert_clipped_grads_match as assert_clipped_grads_match,
)
from gradtest._src.optimisers.masks import assert_masked as assert_masked
from gradtest._src.optimisers.meta import (
    assert_meta_grads_match as assert_meta_grads_match,
)
from gradtest._src.optimisers.overflow import (
    assert_overflow_skipped as assert_overflow_skipped,
)
from gradtest._src.optimisers.reduction import (
    assert_loss_reduction as assert_loss_reduction,
)
from gradtest._src.optimisers.updates import (
    assert_update_matches as assert_update_matches,
)
