"""Chex-style assertions that a gradient is right: for JAX, Flax and Optax projects."""

from gradtest import domains as domains
from gradtest._src.asserts import assert_autodiff_matches as assert_autodiff_matches
from gradtest._src.asserts import assert_grad_matches as assert_grad_matches
from gradtest._src.asserts import check as check
from gradtest._src.findings import Finding as Finding
from gradtest._src.findings import GradientInconclusive as GradientInconclusive
from gradtest._src.findings import GradientMismatch as GradientMismatch
from gradtest._src.findings import Report as Report
from gradtest._src.findings import Verdict as Verdict
from gradtest._src.gradients import assert_grads_close as assert_grads_close
from gradtest._src.gradients import assert_grads_finite as assert_grads_finite
from gradtest._src.gradients import assert_grads_flow as assert_grads_flow
