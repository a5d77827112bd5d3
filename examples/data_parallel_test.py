"""The steps of `data_parallel.py` as a test: the right ones pass, the mistakes do not.

Runs with `python examples/data_parallel_test.py`, which simulates eight devices, and
with pytest under `XLA_FLAGS=--xla_force_host_platform_device_count=8`.
"""

import data_parallel
import jax
import pytest
from absl.testing import absltest, parameterized

import gradtest

pytestmark = pytest.mark.devices

SAYS = {
    "each device's own mean, averaged": "the mean of the gradients of 8 parts",
    "no reduction": "each holds the gradient of its own part",
    "no reduction, unseen without check_vma": "each holds the gradient of its own part",
    "reduced twice: by JAX under check_vma, and by hand": (
        "8 times too large .* the size of mesh axis 'data'; under check_vma=True"
    ),
}


class DataParallelTest(parameterized.TestCase):
    @parameterized.parameters(*data_parallel.RIGHT)
    def test_a_right_step_has_the_full_batchs_gradient(self, name):
        report = data_parallel.assert_step(
            data_parallel.RIGHT[name](), data_parallel.initial_params()
        )
        self.assertIn("the result of each of 8 devices was checked", report.notes)

    @parameterized.parameters(*data_parallel.MISTAKES)
    def test_a_mistake_is_refused_and_named(self, name):
        with self.assertRaisesRegex(gradtest.GradientMismatch, SAYS[name]):
            data_parallel.assert_step(
                data_parallel.MISTAKES[name](), data_parallel.initial_params()
            )

    def test_the_right_steps_train_alike(self):
        params = data_parallel.initial_params()
        first, *others = (
            data_parallel.train(make(), params, steps=3)
            for make in data_parallel.RIGHT.values()
        )
        for other in others:
            self.assertAlmostEqual(first, other, places=4)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", data_parallel.DEVICES)
    absltest.main()
