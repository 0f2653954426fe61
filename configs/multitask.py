"""Several tasks on the rows of a table, with shared experts and a gate for each task.

Every expert is a small network. Each task's gate mixes their outputs, and the task's tower predicts
from the mixture, so that the gates decide what the tasks share. The baselines of the paper share
differently: one gate for all tasks, or one network for all tasks.

    moejax train --config=configs/multitask.py --workdir=runs/mmoe
    moejax train --config=configs/multitask.py:sharing=shared_bottom --workdir=runs/bottom
    moejax train --config=configs/multitask.py:data=recommender --workdir=runs/rec
    moejax train --config=configs/multitask.py:data=groups,gate=dselect_k,gate_input=constant \\
                 --workdir=runs/groups
    moejax train --config=configs/multitask.py:data=file --config.data.path=ml-latest-small \\
                 --workdir=runs/movielens
    moejax train --config=configs/multitask.py:data=file --config.data.path=sales.csv \\
                 --config.task.targets="price,dear=price>=100" --workdir=runs/sales

Argument, as key=value,key=value:

    data        correlated: two regressions whose weights have cosine rho (the default)
                groups: 16 regressions in two groups, each with hidden experts of its own
                recommender: ratings and finished views, from users and items of known structure
                file: a CSV, TSV or Parquet file, or a folder of MovieLens, in data.path
                (docs/multitask.md has the fields)
    gate        dense (the paper's softmax), top_k, dselect_k, or another that reads one example
    gate_input  example, or constant: one choice for all examples
    sharing     mmoe (a gate per task), omoe (one gate), shared_bottom (no experts)
    rho         correlation of the correlated tasks (0.5)

The loss is the sum over tasks of the squared error in units of the target's variance, or of the log
loss in nats; metrics are mse/NAME, log_loss/NAME, accuracy/NAME and auc/NAME. A run ends with its
held-out loss next to three predictors: the mean, a linear model, and "ideal", which knows the
generator. Expect, after 2000 steps (a minute on two cores, most of it compiling) and with one seed:
correlated 1.01 (mean 1.92, linear 1.17), recommender 1.17 (mean 1.71, linear 1.25, ideal 0.77),
groups 0.008 (linear 4.5, ideal 0.005). docs/multitask.md has more.

Papers: Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD, doi 10.1145/3219819.3220007 (the model, the correlated tasks, 8 experts of
width 16, towers of width 8); Hazimeh et al. 2021, "DSelect-k", arXiv 2106.03760 (sparse gates,
static gating, groups of tasks).

Override any field to vary the run: `--config.moe.num_experts=16`, `--config.task.rows=100000`,
`--config.task.data_seed=1`. `moejax config --config=configs/multitask.py` lists them all.
"""

from moejax.config import Config, choose, default, parse_arg, set_gate

DATA = {
    "correlated": {},
    "groups": {"optim.learning_rate": 1e-2},
    "recommender": {},
    "file": {},
}
GATES = {
    "dense": {},
    "top_k": {"moe.losses.load_balance": 0.01},
    "dselect_k": {},
}
"""Fields that these gates need; any other gate starts from its own preset."""


def get_config(arg: str | None = None) -> Config:
    options = parse_arg(
        arg, data="correlated", gate="dense", gate_input="example", sharing="mmoe", rho=0.5
    )
    config = default("multitask")
    set_gate(config, options.gate)
    config.update_from_flattened_dict(choose("data", options.data, DATA))
    config.update_from_flattened_dict(GATES.get(options.gate, {}))
    if (options.gate, options.gate_input) == ("dselect_k", "constant"):
        config.moe.gate.per_example = False
    config.task.data, config.task.rho = options.data, options.rho
    config.task.gate_input, config.task.sharing = options.gate_input, options.sharing
    config.moe.every = int(options.sharing != "shared_bottom")
    return config
