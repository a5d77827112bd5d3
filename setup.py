"""Package metadata; the settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds are the oldest versions the tests run on. JAX moves its internals
# from one minor release to the next, hence an upper bound: the newest one tested.
# NumPy comes with JAX, which alone knows the versions that fit it.
RUN_TIME = [
    "jax>=0.10.2,<0.13",
    "jaxlib>=0.10.2,<0.13",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "chex>=0.1.92",
    "absl-py>=2.5",
]
PLOTS = ["matplotlib>=3.10,<4"]
# The handwritten digits that an example trains on: a data set that is installed, not
# downloaded. Nothing else of scikit-learn is used, so its newest version will do.
EXAMPLES = ["scikit-learn>=1.6,<2"]
# Searches for inputs that break a gradient, shrinks them and keeps them.
HUNT = ["hypothesis>=6.150,<7"]
# The examples are tested too; the pytest plugin also with workers, and what draws a
# report's pictures.
TEST = ["pytest>=9.1,<10", "pytest-xdist>=3.8,<4", *EXAMPLES, *PLOTS, *HUNT]
# A new release of a linter or a type checker may refuse what passed yesterday.
LINT = ["ruff>=0.17.6,<0.18", "mypy>=2.4,<2.5"]

setup(
    name="gradtest",
    version="0.1.0",
    description="Checks hand-written gradients in JAX.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The gradtest authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gradtest", "gradtest.*"]),
    package_data={"gradtest": ["py.typed"]},
    install_requires=RUN_TIME,
    extras_require={
        "plots": PLOTS,
        "hunt": HUNT,
        "examples": EXAMPLES,
        "test": TEST,
        "dev": TEST + LINT,
    },
    entry_points={
        "console_scripts": ["gradtest = gradtest._src.cli:main"],
        "pytest11": ["gradtest = gradtest.pytest_plugin"],
    },
    zip_safe=False,
)
