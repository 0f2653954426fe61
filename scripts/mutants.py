"""Small mistakes in the source that the tests must notice, and a check that they do.

    python scripts/mutants.py                     # all of them, in about half an hour on two cores
    python scripts/mutants.py --only remoe        # those whose name contains "remoe"
    python scripts/mutants.py --list

Each mutant is one edit of one file. It is made in a temporary copy of the working tree, where the
test that is named with it must fail; without an edit it must pass. Nothing here changes the tree
itself. Exit status 1 if a mutant survives, 2 if the tests fail without one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """A mistake: ``old``, which occurs once in ``file``, becomes ``new``.

    ``test``, a function of ``test_file``, must fail then, in one of its cases at least.
    """

    name: str
    file: str
    old: str
    new: str
    test_file: str
    test: str

    @property
    def id(self) -> str:
        """Pytest's name of the test, without parameters."""
        return f"{self.test_file}::{self.test}"


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "ops_group_mean_over_all_tokens",
        "moejax/gating/ops.py",
        "jnp.maximum(jnp.sum(valid_GT, axis=1), 1)",
        "valid_GT.shape[1]",
        "tests/gating/test_ops.py",
        "test_means_are_over_the_valid_tokens_and_0_where_there_are_none",
    ),
    Mutant(
        "ops_group_mean_of_padding",
        "moejax/gating/ops.py",
        "total_G = jnp.sum(jnp.where(valid_GT, value_GT, 0.0), axis=1)",
        "total_G = jnp.sum(value_GT, axis=1)",
        "tests/gating/test_ops.py",
        "test_means_are_over_the_valid_tokens_and_0_where_there_are_none",
    ),
    Mutant(
        "loss_free_softmax_probabilities",
        "moejax/gating/loss_free.py",
        "RouterStats(logits_GTE, probs_GTE, probs_GTE)",
        "RouterStats(logits_GTE, jax.nn.softmax(logits_GTE), probs_GTE)",
        "tests/gating/test_loss_free.py",
        "test_the_routers_probabilities_are_the_scores_over_their_sum",
    ),
    Mutant(
        "hierarchical_z_loss_of_noisy_logits",
        "moejax/gating/hierarchical.py",
        "(clean.outer_GTA[..., None] + clean.inner_GTAJ)",
        "(noisy.outer_GTA[..., None] + noisy.inner_GTAJ)",
        "tests/gating/test_hierarchical.py",
        "test_in_training_too_probabilities_and_the_z_losses_logits_are_those_without_noise",
    ),
    Mutant(
        "gating_dropout_without_jitter",
        "moejax/gating/gating_dropout.py",
        "logits_GTE = self.logits(params, x_GTD, context)",
        'logits_GTE = ops.router_logits(x_GTD, params["router_DE"])',
        "tests/gating/test_gating_dropout.py",
        "test_a_local_step_routes_the_jittered_tokens_of_top_k",
    ),
    Mutant(
        "expert_choice_slots_below_the_choice",
        "moejax/gating/expert_choice.py",
        "return max(factor, 1.0) if",
        "return factor if",
        "tests/gating/test_expert_choice.py",
        "test_every_expert_is_filled_and_weights_are_probabilities",
    ),
    Mutant(
        "expert_choice_above_the_threshold",
        "moejax/gating/expert_choice.py",
        "score_GTE >= state",
        "score_GTE > state",
        "tests/gating/test_expert_choice.py",
        "test_a_probability_at_the_threshold_passes_it",
    ),
    Mutant(
        "remoe_lambda_rises_at_k",
        "moejax/gating/remoe.py",
        "stats.pairs > self.k * stats.tokens",
        "stats.pairs >= self.k * stats.tokens",
        "tests/gating/test_remoe.py",
        "test_lambda_rises_only_where_tokens_visit_more_than_k_experts",
    ),
    Mutant(
        "quantile_prices_of_no_tokens",
        "moejax/gating/quantile.py",
        'jnp.where(stats.tokens > 0, mean_E, state["price_E"])',
        "mean_E",
        "tests/gating/test_quantile.py",
        "test_a_batch_without_valid_tokens_leaves_the_prices_as_they_are",
    ),
    Mutant(
        "policy_summed_over_layers",
        "moejax/losses.py",
        " * policy.log_prob_GT.shape[0]",
        "",
        "tests/test_losses.py",
        "test_the_policys_losses_are_means_over_layers_and_valid_tokens",
    ),
)


def mutated(mutant: Mutant, source: str) -> str:
    """The file's text with the mistake in it.

    Raises:
      ValueError: the text to replace does not occur exactly once.
    """
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}")
    return source.replace(mutant.old, mutant.new)


def copy_tree(root: Path, target: Path) -> None:
    """Copies what git tracks or would add, as it lies in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


class Outcome(NamedTuple):
    """How tests ended: pytest's exit status, which tests failed, and what it printed."""

    status: int
    failed: frozenset[str]
    text: str


def run_tests(tree: Path, tests: Iterable[str]) -> Outcome:
    """Runs tests of a copy of the tree, by its own sources."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests],
        cwd=tree,
        # In front of an installed moejax, also in the processes that tests start.
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = (line.split() for line in done.stdout.splitlines())
    failed = frozenset(words[1].partition("[")[0] for words in lines if words[:1] == ["FAILED"])
    return Outcome(done.returncode, failed, done.stdout)


def is_noticed(tree: Path, mutant: Mutant) -> bool:
    """Whether the mutant's test fails with it; the tree is as before afterwards.

    Raises:
      RuntimeError: the test did not run.
    """
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(mutated(mutant, source))
    try:
        found = run_tests(tree, [mutant.id])
    finally:
        path.write_text(source)
    if found.status not in (0, 1) or (found.status == 1) != (mutant.id in found.failed):
        raise RuntimeError(f"{mutant.name}: {mutant.id} did not run\n{found.text}")
    return found.status == 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--list", action="store_true", help="print names and edits, run nothing")
    args = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if args.only in mutant.name]
    if not chosen:
        parser.error(f"no mutant has {args.only!r} in its name; --list shows them all")
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name}: {mutant.file}\n  - {mutant.old}\n  + {mutant.new}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(ROOT, tree)
        whole = run_tests(tree, sorted({mutant.id for mutant in chosen}))
        if whole.status:
            print(f"{whole.text}\nthe tests fail without any mutant", file=sys.stderr)
            return 2
        alive = 0
        for mutant in chosen:
            noticed = is_noticed(tree, mutant)
            alive += not noticed
            said = "noticed" if noticed else f"SURVIVES {mutant.id}:"
            print(f"{said} {mutant.name}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants were noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
