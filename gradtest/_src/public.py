"""The public names of `gradtest`, which are imported when the first of them is used."""

from gradtest import domains as domains
from gradtest._src.asserts import assert_autodiff_matches as assert_autodiff_matches
from gradtest._src.asserts import (
    assert_custom_rules_match as assert_custom_rules_match,
)
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
from gradtest._src.graphs import Graph as Graph
from gradtest._src.graphs import GraphvizError as GraphvizError
from gradtest._src.graphs import graph as graph
from gradtest._src.hunting.asserting import hunt as hunt
from gradtest._src.intentions import vjp as vjp
from gradtest._src.parallel.assertion import (
    assert_parallel_grads_match as assert_parallel_grads_match,
)
from gradtest._src.power.report import Power as Power
from gradtest._src.power.run import power as power
from gradtest._src.products import assert_grads_agree as assert_grads_agree
from gradtest._src.products import assert_hvp_matches as assert_hvp_matches
from gradtest._src.products import assert_jvp_matches as assert_jvp_matches
from gradtest._src.products import assert_transpose_matches as assert_transpose_matches
from gradtest._src.products import assert_vjp_matches as assert_vjp_matches
from gradtest._src.report.archive import load_inputs as load_inputs
from gradtest._src.variants_agree import assert_variants_agree as assert_variants_agree
from gradtest._src.watching.watcher import Watcher as Watcher
from gradtest._src.watching.watcher import watch as watch
