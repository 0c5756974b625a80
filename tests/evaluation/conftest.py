from training_fixtures import fresh_accelerate, log  # noqa: F401
