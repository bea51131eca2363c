from tests.verification.conftest import checkpoint, conversion, copy  # noqa: F401 - fixtures
