from tests.benchmark.conftest import program, small, small_checkpoint, small_copy  # noqa: F401 - fixtures
