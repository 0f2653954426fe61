"""A transformer with experts learns the majority of 7 bits."""

from moejax.config import Config, default


def get_config() -> Config:
    """Sizes that train in seconds."""
    config = default("tests.majority.fields:TASK")  # the one line that makes the task known
    config.model.d_model = 16
    config.model.d_ff = 32
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.moe.num_experts = 4
    config.moe.d_ff = 16
    config.train.batch_size = 32
    config.train.steps = 30
    config.train.eval_every = 15
    config.train.checkpoint_every = 15
    config.train.log_every = 1
    config.train.eval_rows = 32
    config.optim.learning_rate = 3e-2
    config.optim.warmup_steps = 0
    config.report.probe_rows = 4
    return config
