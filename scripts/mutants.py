"""Small mistakes in the source that the tests must notice, and a check that they do.

    python scripts/mutants.py                     # all of them, one after the other
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
        "jnp.maximum(jnp.sum(valid_GT, axis=1, dtype=jnp.float32), 1.0)",
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
        "test_probabilities_and_z_loss_logits_are_without_noise_even_in_training",
    ),
    Mutant(
        "gating_dropout_without_jitter",
        "moejax/gating/gating_dropout.py",
        "logits_GTE = self.top_k.logits(params, x_GTD, context)",
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
        "test_a_batch_without_valid_tokens_leaves_the_prices_unchanged",
    ),
    Mutant(
        "policy_summed_over_layers",
        "moejax/losses.py",
        " * policy.log_prob_GT.shape[0]",
        "",
        "tests/test_losses.py",
        "test_the_policy_losses_are_means_over_layers_and_valid_tokens",
    ),
    Mutant(
        "ops_mean_over_padding",
        "moejax/gating/ops.py",
        "count = jnp.maximum(jnp.sum(context.valid_GT, dtype=jnp.float32), 1.0)",
        "count = context.valid_GT.size",
        "tests/gating/test_ops.py",
        "test_means_are_over_the_valid_tokens_and_0_where_there_are_none",
    ),
    Mutant(
        "policy_reward_has_a_gradient",
        "moejax/losses.py",
        "reward_BL = jax.lax.stop_gradient(reward_BL)",
        "pass",
        "tests/test_losses.py",
        "test_reward_and_baseline_are_constants_to_the_policy_and_the_reward_to_both",
    ),
    Mutant(
        "policy_advantage_has_a_gradient",
        "moejax/losses.py",
        "jax.lax.stop_gradient(advantage) * policy",
        "advantage * policy",
        "tests/test_losses.py",
        "test_reward_and_baseline_are_constants_to_the_policy_and_the_reward_to_both",
    ),
    Mutant(
        "load_balance_counts_have_a_gradient",
        "moejax/losses.py",
        (
            "share_QE = jax.lax.stop_gradient(load_QE / _at_least_one(jnp.sum(load_QE, -1, "
            "keepdims=True)))"
        ),
        "share_QE = load_QE / _at_least_one(jnp.sum(load_QE, -1, keepdims=True))",
        "tests/test_losses.py",
        "test_the_balance_loss_has_no_gradient_through_its_counts",
    ),
    Mutant(
        "evaluation_has_the_training_capacity",
        "moejax/layers/moe.py",
        "transport = config.transport if context.train else config.eval_transport",
        "transport = config.transport",
        "tests/layers/test_moe_choices.py",
        "test_training_and_evaluation_have_separate_capacity_factors",
    ),
    Mutant(
        "random_priority_by_the_gates_noise",
        "moejax/layers/moe.py",
        "context, (), tag=PRIORITY_NOISE)",
        "context, ())",
        "tests/layers/test_moe_choices.py",
        "test_random_priority_is_independent_of_the_gates_own_draw",
    ),
    Mutant(
        "depths_even_odds_pass",
        "moejax/layers/depths.py",
        "(logit_BL > 0) & context.valid_BL",
        "(logit_BL >= 0) & context.valid_BL",
        "tests/layers/test_depths.py",
        "test_a_token_with_even_odds_skips_the_block_in_evaluation",
    ),
    Mutant(
        "moa_balance_over_padding",
        "moejax/layers/moa.py",
        "losses.load_balance(load_BE, stats.probs_GTE, valid_BL)",
        "losses.load_balance(load_BE, stats.probs_GTE, jnp.ones_like(valid_BL))",
        "tests/layers/test_moa.py",
        "test_every_token_uses_its_k_best_heads",
    ),
    Mutant(
        "rows_violation_of_the_worst_layer",
        "moejax/train/metrics/rows.py",
        "(load.max(axis=-1, keepdims=True) / mean_load - 1).mean()",
        "(load.max(axis=-1, keepdims=True) / mean_load - 1).max()",
        "tests/train/test_report.py",
        "test_balance_and_drops_of_two_layers_are_those_worked_by_hand",
    ),
    Mutant(
        "rows_drops_per_token",
        "moejax/train/metrics/rows.py",
        "int(dropped.sum()) / pairs",
        "int(dropped.sum()) / tokens",
        "tests/train/test_report.py",
        "test_balance_and_drops_of_two_layers_are_those_worked_by_hand",
    ),
    Mutant(
        "rows_unserved_per_pair",
        "moejax/train/metrics/rows.py",
        "int(stats.unserved_tokens.sum()) / tokens",
        "int(stats.unserved_tokens.sum()) / pairs",
        "tests/train/test_report.py",
        "test_balance_and_drops_of_two_layers_are_those_worked_by_hand",
    ),
    Mutant(
        "rows_entropy_of_a_layer",
        "moejax/train/metrics/rows.py",
        "float(stats.entropy.sum()) / tokens",
        "float(stats.entropy.mean()) / tokens",
        "tests/train/test_report.py",
        "test_balance_and_drops_of_two_layers_are_those_worked_by_hand",
    ),
    Mutant(
        "rows_gate_state_as_metric",
        "moejax/train/metrics/rows.py",
        "if np.ndim(value) == 1",
        "if np.ndim(value) >= 1",
        "tests/train/test_report.py",
        "test_balance_and_drops_of_two_layers_are_those_worked_by_hand",
    ),
    Mutant(
        "lion_rates_swapped",
        "moejax/train/optim.py",
        "optax.scale_by_lion(b1=optim_cfg.b1, b2=optim_cfg.b2)",
        "optax.scale_by_lion(b1=optim_cfg.b2, b2=optim_cfg.b1)",
        "tests/train/test_optim.py",
        "test_lion_looks_back_by_b1_and_remembers_by_b2",
    ),
    Mutant(
        "adam_eps_ignored",
        "moejax/train/optim.py",
        "b2=optim_cfg.b2, eps=optim_cfg.eps)",
        "b2=optim_cfg.b2)",
        "tests/train/test_optim.py",
        "test_a_gradient_of_the_size_of_eps_moves_adam_half_as_far",
    ),
    Mutant(
        "wsd_decays_in_warm_up",
        "moejax/train/optim.py",
        "max(warmup, steps - round(",
        "max(0, steps - round(",
        "tests/train/test_optim.py",
        "test_wsd_is_flat_until_its_linear_decay",
    ),
    Mutant(
        "decay_of_gates_by_name",
        "moejax/train/parameters.py",
        'frozenset({"router", "gate"})',
        'frozenset({"router"})',
        "tests/train/test_optim.py",
        "test_names_without_axis_letters_stand_for_matrices_in_the_last_two_axes",
    ),
    Mutant(
        "decay_of_biases_by_name",
        "moejax/train/parameters.py",
        'self.stem not in ("scale", "bias")',
        'self.stem not in ("scale",)',
        "tests/train/test_optim.py",
        "test_names_without_axis_letters_stand_for_matrices_in_the_last_two_axes",
    ),
    Mutant(
        "verdict_at_the_level_corrected",
        "moejax/sweep/statistics.py",
        "if p_holm < LEVEL:",
        "if p_holm <= LEVEL:",
        "tests/sweep/test_statistics.py",
        "test_a_p_value_equal_to_the_level_is_not_significant",
    ),
    Mutant(
        "verdict_at_the_level_alone",
        "moejax/sweep/statistics.py",
        "if difference.p < LEVEL else SAME",
        "if difference.p <= LEVEL else SAME",
        "tests/sweep/test_statistics.py",
        "test_a_p_value_equal_to_the_level_is_not_significant",
    ),
    Mutant(
        "interval_with_two_decimals",
        "moejax/sweep/statistics.py",
        "min(max(3, -math.floor",
        "min(max(2, -math.floor",
        "tests/sweep/test_statistics.py",
        "test_an_interval_is_shown_with_three_to_six_decimals",
    ),
    Mutant(
        "interval_with_nine_decimals",
        "moejax/sweep/statistics.py",
        "(half_width))), 6)",
        "(half_width))), 9)",
        "tests/sweep/test_statistics.py",
        "test_an_interval_is_shown_with_three_to_six_decimals",
    ),
    Mutant(
        "mean_over_rows_that_weigh_wrongly",
        "moejax/config/saved.py",
        "before = [0, *steps]",
        "before = [1, *steps]",
        "tests/sweep/test_results.py",
        "test_a_trials_numbers_are_means_over_its_steps_and_those_of_its_last_evaluation",
    ),
    Mutant(
        "loss_of_the_first_evaluation",
        "moejax/sweep/results.py",
        'if row.get("split") == "eval"][-1]',
        'if row.get("split") == "eval"][0]',
        "tests/sweep/test_results.py",
        "test_a_trials_numbers_are_means_over_its_steps_and_those_of_its_last_evaluation",
    ),
    Mutant(
        "mean_step_in_place_of_the_median",
        "moejax/sweep/results.py",
        "median = statistics.median(measured)",
        "median = statistics.fmean(measured)",
        "tests/sweep/test_results.py",
        "test_one_slow_interval_moves_the_total_and_not_the_median",
    ),
    Mutant(
        "match_without_the_smallest_width",
        "moejax/sweep/match.py",
        "if width < MULTIPLE:",
        "if width <= MULTIPLE:",
        "tests/sweep/test_match.py",
        "test_the_smallest_width_is_a_solution",
    ),
    Mutant(
        "match_missed_by_dearer_variants_only",
        "moejax/sweep/comparison.py",
        "abs(ratio - 1) > TOLERANCE",
        "ratio - 1 > TOLERANCE",
        "tests/sweep/test_comparison.py",
        "test_a_true_cost_2_percent_away_misses_the_match",
    ),
    Mutant(
        "baseline_must_match_itself",
        "moejax/sweep/comparison.py",
        "is not None and result.variant != sweep.comparison.baseline",
        "is not None",
        "tests/sweep/test_comparison.py",
        "test_the_baseline_cannot_miss_the_match",
    ),
    Mutant(
        "detectable_by_the_most_seeds",
        "moejax/sweep/seed_variance.py",
        "least, many = min(common)",
        "least, many = max(common)",
        "tests/sweep/test_seed_variance.py",
        "test_the_variant_with_the_fewest_common_seeds_limits_the_detectable_difference",
    ),
    Mutant(
        "favourites_of_lift_1",
        "moejax/analysis/statistics/kinds.py",
        "lift_CE[kinds, expert] > 1]",
        "lift_CE[kinds, expert] >= 1]",
        "tests/analysis/statistics/test_kinds.py",
        "test_kinds_of_lift_1_are_not_favourites",
    ),
    Mutant(
        "shazeer_without_min_std",
        "moejax/gating/noisy_top_k.py",
        'params["noise_DE"])) + self.min_std',
        'params["noise_DE"]))',
        "tests/gating/test_token_choice.py",
        "test_shazeers_load_is_the_selection_probability_under_noise_of_at_least_min_std",
    ),
    Mutant(
        "shazeer_z_loss_of_noisy_logits",
        "moejax/gating/noisy_top_k.py",
        "RouterStats(clean_GTE, probs_GTE, load_GTE)",
        "RouterStats(noisy_GTE, probs_GTE, load_GTE)",
        "tests/gating/test_token_choice.py",
        "test_shazeers_statistics_use_logits_without_noise",
    ),
    Mutant(
        "shazeer_probabilities_of_noisy_logits",
        "moejax/gating/noisy_top_k.py",
        "probs_GTE = jax.nn.softmax(clean_GTE, axis=-1)",
        "probs_GTE = jax.nn.softmax(noisy_GTE, axis=-1)",
        "tests/gating/test_token_choice.py",
        "test_shazeers_statistics_use_logits_without_noise",
    ),
    Mutant(
        "rl_entropy_is_a_penalty",
        "moejax/gating/rl.py",
        '"rl_entropy"] = -self',
        '"rl_entropy"] = self',
        "tests/gating/test_rl.py",
        "test_the_entropy_bonus_lowers_the_loss_by_its_weight_times_the_mean_entropy",
    ),
    Mutant(
        "reroute_to_probability_0",
        "moejax/dispatch/reroute.py",
        "& (prob_GTE > 0)",
        "& (prob_GTE >= 0)",
        "tests/dispatch/test_reroute.py",
        "test_the_second_token_of_a_full_expert_moves_as_worked_out_by_hand",
    ),
    Mutant(
        "reroute_inactive_columns_visit",
        "moejax/dispatch/reroute.py",
        "jnp.any(hit_GTKE & active_GTK[..., None], axis=2)",
        "jnp.any(hit_GTKE, axis=2)",
        "tests/dispatch/test_reroute.py",
        "test_the_second_token_of_a_full_expert_moves_as_worked_out_by_hand",
    ),
    Mutant(
        "reroute_weight_underflows",
        "moejax/dispatch/reroute.py",
        "jnp.maximum(scaled_GT, tiny)",
        "scaled_GT",
        "tests/dispatch/test_reroute.py",
        "test_the_second_token_of_a_full_expert_moves_as_worked_out_by_hand",
    ),
    Mutant(
        "plan_with_experts_below_0",
        "moejax/dispatch/pack.py",
        "(weight_tK > 0) & (expert_tK >= 0)",
        "(weight_tK > 0)",
        "tests/dispatch/test_pack.py",
        "test_pairs_of_experts_on_other_shards_have_no_row",
    ),
    Mutant(
        "plan_keys_overflow",
        "moejax/dispatch/pack.py",
        "if (num_experts + 1) * pairs > jnp.iinfo(jnp.int32).max:",
        "if (num_experts + 1) * pairs < 0:",
        "tests/dispatch/test_pack.py",
        "test_pairs_are_sorted_even_if_their_keys_exceed_int32",
    ),
    Mutant(
        "thor_draws_for_the_last_token",
        "moejax/gating/thor.py",
        "tokens(uniform_BL)[:, :1]",
        "tokens(uniform_BL)[:, -1:]",
        "tests/gating/test_unlearned.py",
        "test_thors_expert_of_a_sequence_does_not_depend_on_its_length",
    ),
    Mutant(
        "adafactor_momentum_biased",
        "moejax/train/optim.py",
        "optax.ema(optim_cfg.b1, debias=True)",
        "optax.ema(optim_cfg.b1, debias=False)",
        "tests/train/test_optim.py",
        "test_the_first_update_of_a_vector_is_the_learning_rate_whatever_its_gradient",
    ),
    Mutant(
        "probe_does_not_miss_step_0",
        "moejax/record/probe.py",
        "sorted({0, *_evaluated(Path(workdir))}",
        "sorted({*_evaluated(Path(workdir))}",
        "tests/record/test_probe.py",
        "test_a_missing_recording_of_step_0_is_reported",
    ),
    Mutant(
        "probe_arrays_with_too_few_axes",
        "moejax/record/probe.py",
        "if array.ndim != len(axes) or array.shape != shape:",
        "if array.shape != shape:",
        "tests/record/test_probe.py",
        "test_arrays_that_do_not_fit_the_table_are_not_written",
    ),
    Mutant(
        "unserved_padding",
        "moejax/layers/routing_stats.py",
        "jnp.sum(valid_BL & ~served_BL, dtype=jnp.int32)",
        "jnp.sum(~served_BL, dtype=jnp.int32)",
        "tests/layers/test_routing_stats.py",
        "test_pairs_are_counted_by_expert_position_and_column_and_unserved_tokens_too",
    ),
    Mutant(
        "unserved_by_any_drop",
        "moejax/layers/routing_stats.py",
        "served_BL = jnp.any(active_BLK & kept_BLK, axis=-1)",
        "served_BL = jnp.all(kept_BLK | ~active_BLK, axis=-1)",
        "tests/layers/test_routing_stats.py",
        "test_a_token_is_served_if_one_of_its_pairs_was_kept",
    ),
    Mutant(
        "drops_by_position_of_tokens",
        "moejax/layers/routing_stats.py",
        "dropped_L=jnp.sum(dropped_BLK, axis=(0, 2), dtype=jnp.int32)",
        "dropped_L=jnp.sum(jnp.any(dropped_BLK, axis=2), axis=0, dtype=jnp.int32)",
        "tests/layers/test_routing_stats.py",
        "test_pairs_are_counted_by_expert_position_and_column_and_unserved_tokens_too",
    ),
    Mutant(
        "drops_by_column_reversed",
        "moejax/layers/routing_stats.py",
        "dropped_K=jnp.sum(dropped_BLK, axis=(0, 1), dtype=jnp.int32)",
        "dropped_K=jnp.sum(dropped_BLK[..., ::-1], axis=(0, 1), dtype=jnp.int32)",
        "tests/layers/test_routing_stats.py",
        "test_pairs_are_counted_by_expert_position_and_column_and_unserved_tokens_too",
    ),
    Mutant(
        "probabilities_of_padding",
        "moejax/layers/routing_stats.py",
        "prob_E=jnp.sum(jnp.where(valid, probs_BLE, 0.0), axis=(0, 1))",
        "prob_E=jnp.sum(probs_BLE, axis=(0, 1))",
        "tests/layers/test_routing_stats.py",
        "test_probabilities_and_entropies_are_summed_over_valid_tokens",
    ),
    Mutant(
        "entropy_of_padding",
        "moejax/layers/routing_stats.py",
        "jnp.sum(jnp.where(valid, probs_BLE * log_BLE, 0.0))",
        "jnp.sum(probs_BLE * log_BLE)",
        "tests/layers/test_routing_stats.py",
        "test_probabilities_and_entropies_are_summed_over_valid_tokens",
    ),
    Mutant(
        "cuts_are_not_wanted",
        "moejax/layers/routing_stats.py",
        "load_E=stats.load_E + cut_E,",
        "load_E=stats.load_E,",
        "tests/layers/test_routing_stats.py",
        "test_pairs_cut_by_a_gate_count_as_wanted_and_dropped",
    ),
    Mutant(
        "cuts_at_no_position",
        "moejax/layers/routing_stats.py",
        "dropped_L=stats.dropped_L + jnp.sum(cut_BLE, axis=(0, 2), dtype=jnp.int32)",
        "dropped_L=stats.dropped_L",
        "tests/layers/test_routing_stats.py",
        "test_pairs_cut_by_a_gate_count_as_wanted_and_dropped",
    ),
    Mutant(
        "load_of_a_task_and_later_ones",
        "moejax/layers/routing_stats.py",
        "own_MB = task_B == jnp",
        "own_MB = task_B >= jnp",
        "tests/layers/test_routing_stats.py",
        "test_the_load_of_a_task_counts_its_own_sequences_only",
    ),
    Mutant(
        "group_means_weigh_alike",
        "moejax/layers/routing_stats.py",
        "jnp.tensordot(tokens_G, value_G, axes=1)",
        "jnp.sum(value_G, axis=0) * jnp.mean(tokens_G)",
        "tests/layers/test_routing_stats.py",
        "test_group_means_are_weighted_by_their_valid_tokens",
    ),
    Mutant(
        "load_loss_of_padding",
        "moejax/layers/routing_stats.py",
        "jnp.where(valid_QU[..., None], router.load_GTE, 0.0)",
        "router.load_GTE",
        "tests/layers/test_routing_stats.py",
        "test_losses_are_means_over_sequences_weighted_by_their_valid_tokens",
    ),
    Mutant(
        "load_loss_of_probabilities",
        "moejax/layers/routing_stats.py",
        "jnp.where(valid_QU[..., None], router.load_GTE, 0.0)",
        "jnp.where(valid_QU[..., None], router.probs_GTE, 0.0)",
        "tests/layers/test_routing_stats.py",
        "test_losses_are_means_over_sequences_weighted_by_their_valid_tokens",
    ),
    Mutant(
        "squared_shares_weigh_alike",
        "moejax/losses.py",
        "_over_scopes(num_experts * jnp.sum(jnp.square(share_QE), axis=-1), tokens_Q)",
        "jnp.mean(num_experts * jnp.sum(jnp.square(share_QE), axis=-1))",
        "tests/layers/test_routing_stats.py",
        "test_losses_are_means_over_sequences_weighted_by_their_valid_tokens",
    ),
    Mutant(
        "scopes_weigh_alike",
        "moejax/losses.py",
        "return jnp.sum(value_Q * tokens_Q) / _at_least_one(jnp.sum(tokens_Q))",
        "return jnp.mean(value_Q)",
        "tests/layers/test_routing_stats.py",
        "test_losses_are_means_over_sequences_weighted_by_their_valid_tokens",
    ),
    Mutant(
        "rerouting_hides_imbalance",
        "moejax/layers/routing_stats.py",
        'lambda x: scoped(x, "sequence"), (output.routing,',
        'lambda x: scoped(x, "sequence"), (routing,',
        "tests/dispatch/test_reroute.py",
        "test_a_layer_reports_the_routing_it_sent_and_counts_the_gates_choices",
    ),
    Mutant(
        "info_of_what_was_not_sent",
        "moejax/layers/routing_stats.py",
        "routing=routing,",
        "routing=output.routing,",
        "tests/dispatch/test_reroute.py",
        "test_a_layer_reports_the_routing_it_sent_and_counts_the_gates_choices",
    ),
    Mutant(
        "rerouted_tokens_in_place_of_pairs",
        "moejax/layers/moe.py",
        "jnp.sum(after.expert_GTK != before.expert_GTK, axis=-1)",
        "jnp.any(after.expert_GTK != before.expert_GTK, axis=-1)",
        "tests/dispatch/test_reroute.py",
        "test_a_layer_reports_the_routing_it_sent_and_counts_the_gates_choices",
    ),
    Mutant(
        "shared_gate_without_sigmoid",
        "moejax/layers/moe.py",
        "jax.nn.sigmoid(score_BL1) * y_BLD",
        "score_BL1 * y_BLD",
        "tests/layers/test_moe.py",
        "test_a_shared_gate_weighs_the_shared_experts_by_a_sigmoid_of_the_token",
    ),
    Mutant(
        "divergence_in_bfloat16",
        "moejax/losses.py",
        "jax.nn.log_softmax(other_BLV.astype(jnp.float32), axis=-1)",
        "jax.nn.log_softmax(other_BLV, axis=-1)",
        "tests/train/test_consistency.py",
        "test_the_divergence_of_bfloat16_predictions_is_taken_in_float32",
    ),
    Mutant(
        "parts_are_means_over_themselves",
        "moejax/train/step.py",
        "task.objective(totals, items), totals",
        "task.objective(totals, totals.items), totals",
        "tests/train/test_step.py",
        "test_an_update_uses_the_mean_over_the_whole_batch_in_any_number_of_parts",
    ),
    Mutant(
        "learning_rate_of_the_next_update",
        "moejax/train/step.py",
        "schedule(state.step)",
        "schedule(state.step + 1)",
        "tests/train/test_step.py",
        "test_an_update_uses_the_mean_over_the_whole_batch_in_any_number_of_parts",
    ),
    Mutant(
        "norm_of_the_update",
        "moejax/train/step.py",
        "optax.tree.norm(grads)",
        "optax.tree.norm(updates)",
        "tests/train/test_step.py",
        "test_an_update_uses_the_mean_over_the_whole_batch_in_any_number_of_parts",
    ),
    Mutant(
        "held_a_step_too_late",
        "moejax/train/step.py",
        "task.hold(updates, state.step)",
        "task.hold(updates, state.step + 1)",
        "tests/train/test_step.py",
        "test_an_update_uses_the_mean_over_the_whole_batch_in_any_number_of_parts",
    ),
    Mutant(
        "evaluation_as_training",
        "moejax/train/step.py",
        "state.step, key, train=False)",
        "state.step, key, train=True)",
        "tests/train/test_step.py",
        "test_an_evaluation_runs_with_train_false",
    ),
    Mutant(
        "groups_cut_by_micro_batches",
        "moejax/train/step.py",
        "jnp.swapaxes(dealt, 0, 1).reshape",
        "dealt.reshape",
        "tests/train/test_step.py",
        "test_whole_groups_are_dealt_to_the_parts_in_turn",
    ),
    Mutant(
        "objective_without_output_z_loss",
        "moejax/tasks/task.py",
        "loss = totals.loss + self.output_z_loss * totals.log_z_square",
        "loss = totals.loss",
        "tests/train/test_step.py",
        "test_an_update_uses_the_mean_over_the_whole_batch_in_any_number_of_parts",
    ),
    Mutant(
        "losses_without_weight_count_nothing",
        "moejax/tasks/task.py",
        "weights.get(name, 1.0)",
        "weights.get(name, 0.0)",
        "tests/train/test_step.py",
        "test_an_update_uses_the_mean_over_the_whole_batch_in_any_number_of_parts",
    ),
    Mutant(
        "depths_without_segments",
        "moejax/layers/depths.py",
        'names += ["segment_BL"] if context.segment_BL is not None else []',
        "names += []",
        "tests/layers/test_depths.py",
        "test_packed_texts_are_refused_where_they_would_compete_for_a_block",
    ),
    Mutant(
        "depths_room_for_padding",
        "moejax/layers/depths.py",
        "room_N[jnp.sum(valid_BL, axis=1, dtype=jnp.int32)][:, None]",
        "room_N[length]",
        "tests/layers/test_depths.py",
        "test_the_best_valid_tokens_are_chosen_in_ascending_order_and_ties_go_to_the_earlier",
    ),
    Mutant(
        "segments_of_places",
        "moejax/gating/ops.py",
        "return group_local(Order.of)(valid_BL)",
        "return Order()",
        "tests/gating/test_merging_gates.py",
        "test_a_segment_is_merged_by_the_weights_of_the_one_before_it",
    ),
    Mutant(
        "sentence_pools_other_texts",
        "moejax/gating/sentence.py",
        "segment_GRL[..., :, None] == segment_GRL[..., None, :]",
        "segment_GRL[..., :, None] >= segment_GRL[..., None, :]",
        "tests/gating/test_sequence_gates.py",
        "test_tokens_are_routed_by_the_mean_of_their_text_segment_or_past",
    ),
    Mutant(
        "merges_places",
        "moejax/dispatch/merge.py",
        "Order() if merge.valid_BL is None else Order.of(merge.valid_BL)",
        "Order()",
        "tests/models/test_padding.py",
        "test_the_outputs_of_a_layer_do_not_depend_on_leading_padding",
    ),
    Mutant(
        "depths_score_padding",
        "moejax/layers/depths.py",
        "self._scores(jnp.where(context.valid_BL[..., None], x_BLD, 0))",
        "self._scores(x_BLD)",
        "tests/layers/test_depths.py",
        "test_padding_may_hold_nan_forwards_and_backwards",
    ),
    Mutant(
        "moa_routes_padding",
        "moejax/layers/moa.py",
        "x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)",
        "pass",
        "tests/layers/test_moa.py",
        "test_router_losses_have_finite_gradients_when_padding_holds_nan",
    ),
    Mutant(
        "inactive_columns_have_a_gradient",
        "moejax/contrib/multitask/mmoe.py",
        "jnp.where(routing.weight_GTK > 0, routing.weight_GTK, 0.0)",
        "routing.weight_GTK",
        "tests/contrib/multitask/test_mmoe.py",
        "test_an_inactive_column_has_neither_weight_nor_gradient",
    ),
    Mutant(
        "second_pass_with_the_same_noise",
        "moejax/tasks/language/task.py",
        "key = jax.random.fold_in(key, SECOND_PASS)",
        "pass",
        "tests/tasks/language/test_task.py",
        "test_a_second_pass_has_another_key_and_half_the_weight_in_training_only",
    ),
    Mutant(
        "consistency_of_one_token",
        "moejax/tasks/language/task.py",
        "{CONSISTENCY: divergence * first.items}",
        "{CONSISTENCY: divergence}",
        "tests/tasks/language/test_task.py",
        "test_a_second_pass_has_another_key_and_half_the_weight_in_training_only",
    ),
    Mutant(
        "second_pass_counts_whole",
        "moejax/tasks/language/task.py",
        "lambda a, b: (a + b) / 2",
        "lambda a, b: a + b",
        "tests/tasks/language/test_task.py",
        "test_a_second_pass_has_another_key_and_half_the_weight_in_training_only",
    ),
    Mutant(
        "noise_of_every_step_alike",
        "moejax/tasks/language/task.py",
        "key=jax.random.fold_in(key, step),",
        "key=jax.random.fold_in(key, 0),",
        "tests/tasks/language/test_task.py",
        "test_a_model_receives_the_inputs_the_rows_and_a_key_of_the_step",
    ),
    Mutant(
        "leak_sees_masked_tokens",
        "moejax/tasks/language/task.py",
        'jnp.where(batch["valid"], batch["tokens"][:, :-1], 0)',
        'batch["tokens"][:, :-1]',
        "tests/tasks/language/test_task.py",
        "test_nats_of_masked_tokens_do_not_depend_on_the_masked_ids",
    ),
    Mutant(
        "totals_of_padding",
        "moejax/tasks/task.py",
        "jnp.sum(jnp.where(valid_B, x_B, jnp.zeros_like(x_B)))",
        "jnp.sum(x_B)",
        "tests/tasks/language/test_task.py",
        "test_the_totals_of_a_batch_sum_over_targets_of_valid_tokens_only",
    ),
    Mutant(
        "auxiliary_losses_not_times_items",
        "moejax/tasks/task.py",
        "lambda loss: loss * items, losses",
        "lambda loss: loss, losses",
        "tests/tasks/language/test_task.py",
        "test_the_totals_of_a_batch_sum_over_targets_of_valid_tokens_only",
    ),
    Mutant(
        "held_by_name_anywhere",
        "moejax/tasks/task.py",
        'if "router" in nodes and name in still:',
        "if name in still:",
        "tests/tasks/language/test_task.py",
        "test_only_a_gates_own_parameters_are_frozen_and_only_when_it_asks_for_it",
    ),
    Mutant(
        "soft_dispatch_without_noise",
        "moejax/gating/soft.py",
        "dispatch_GTX=softmax_over_tokens(noisy_GTX",
        "dispatch_GTX=softmax_over_tokens(logits_GTX",
        "tests/gating/test_soft.py",
        "test_noise_depends_on_the_row_and_is_added_in_training_only",
    ),
    Mutant(
        "stablemoe_frozen_a_step_late",
        "moejax/gating/stablemoe.py",
        "step >= self.stage_steps)",
        "step > self.stage_steps)",
        "tests/gating/test_stablemoe.py",
        "test_the_distilled_router_is_frozen_from_the_first_step_of_stage_2_on",
    ),
    Mutant(
        "rl_baseline_moves_the_input",
        "moejax/gating/rl.py",
        "still_GTD = jax.lax.stop_gradient(x_GTD)",
        "still_GTD = x_GTD",
        "tests/gating/test_rl.py",
        "test_the_baseline_learns_without_a_gradient_to_the_tokens",
    ),
    Mutant(
        "smear_keeps_what_it_should_drop",
        "moejax/gating/smear.py",
        "keep_GRNE = drawn_GRNE >= self.expert_dropout",
        "keep_GRNE = drawn_GRNE < self.expert_dropout",
        "tests/gating/test_merging_gates.py",
        "test_dropout_removes_experts_per_sequence_and_keeps_the_proportions_of_the_rest",
    ),
    Mutant(
        "base_gap_of_a_group",
        "moejax/gating/base_layer.py",
        "best.gap / jnp.maximum(tokens_G, 1.0)",
        "best.gap",
        "tests/layers/test_balanced_gates.py",
        "test_the_gap_of_an_assignment_is_reported_per_token",
    ),
    Mutant(
        "sbase_plan_of_padding",
        "moejax/gating/sbase.py",
        "plan_GTE = jnp.where(context.valid_GT[..., None], plan_GTE, 0.0)",
        "pass",
        "tests/layers/test_balanced_gates.py",
        "test_the_column_error_of_sinkhorn_counts_valid_tokens_only",
    ),
    Mutant(
        "reward_is_the_loss",
        "moejax/tasks/language/task.py",
        "valid_BL, metrics, -nats_BL, valid_BL, log_z_BL",
        "valid_BL, metrics, nats_BL, valid_BL, log_z_BL",
        "tests/tasks/language/test_task.py",
        "test_a_policy_is_rewarded_by_the_log_likelihood_of_valid_targets",
    ),
    Mutant(
        "images_retrieved_by_images",
        "moejax/contrib/multimodal/task.py",
        '"text_to_image": retrieved(logits_BB.T,',
        '"text_to_image": retrieved(logits_BB,',
        "tests/contrib/multimodal/test_task.py",
        "test_captions_are_retrieved_by_images_and_images_by_captions",
    ),
    Mutant(
        "images_held_out_under_the_labels_of_others",
        "moejax/tasks/images/dataset.py",
        "place_N[order] = np.arange(len(order))",
        "place_N[:] = order",
        "tests/tasks/images/test_formats.py",
        "test_the_share_held_out_has_its_own_labels",
    ),
    Mutant(
        "archives_behind_the_first_left_out",
        "moejax/tasks/images/formats/webdataset.py",
        "            if any(block):",
        "            if False:",
        "tests/tasks/images/test_formats.py",
        "test_an_archive_with_another_behind_it_is_refused_rather_than_cut",
    ),
    Mutant(
        "coarse_labels_of_cifar",
        "moejax/tasks/images/formats/cifar.py",
        "record[self.header - 1]",
        "record[0]",
        "tests/tasks/images/test_formats.py",
        "test_cifar_equals_the_same_pictures_in_folders",
    ),
    Mutant(
        "columns_of_cifar_for_rows",
        "moejax/tasks/images/formats/cifar.py",
        "planes.transpose(1, 2, 0)",
        "planes.transpose(2, 1, 0)",
        "tests/tasks/images/test_formats.py",
        "test_cifar_equals_the_same_pictures_in_folders",
    ),
    Mutant(
        "sets_of_pictures_with_a_file_missing",
        "moejax/tasks/images/formats/table.py",
        "if os.path.join(folder, name) not in there:",
        "if False:",
        "tests/tasks/images/test_formats.py",
        "test_globs_and_lists_of_files_are_split_by_names_or_by_a_share",
    ),
    Mutant(
        "binary_tasks_say_one_above_a_half",
        "moejax/contrib/multitask/task.py",
        "right_B = (value_BM[:, m] > 0) ==",
        "right_B = (value_BM[:, m] > 0.5) ==",
        "tests/contrib/multitask/test_task.py",
        "test_a_binary_task_predicts_one_where_its_logit_is_above_0",
    ),
    Mutant(
        "areas_of_padding",
        "moejax/contrib/multitask/task.py",
        'batch["present"] & batch["valid"][:, None]',
        'batch["present"]',
        "tests/contrib/multitask/test_task.py",
        "test_padding_does_not_count_in_the_area_under_the_curve",
    ),
    Mutant(
        "attention_without_sinks",
        "moejax/layers/attention.py",
        "sink_H=self.sink_H[...] if options.sinks else None,",
        "sink_H=None,",
        "tests/layers/test_attention_options.py",
        "test_an_option_of_attention_equals_the_plain_loop",
    ),
    Mutant(
        "attention_window_one_longer",
        "moejax/layers/attention.py",
        "jnp.abs(query_L1 - key_S) < options.window",
        "jnp.abs(query_L1 - key_S) <= options.window",
        "tests/layers/test_attention_options.py",
        "test_an_option_of_attention_equals_the_plain_loop",
    ),
    Mutant(
        "attention_fused_window_one_longer",
        "moejax/layers/attention.py",
        "reach = max(options.window - 1, 0)",
        "reach = options.window",
        "tests/layers/test_attention_options.py",
        "test_an_option_of_attention_equals_the_plain_loop",
    ),
    Mutant(
        "attention_chunks_of_places",
        "moejax/layers/attention.py",
        "first_BL = query_L1[:, 0] - (context.position_BL - chunk_BL * options.window)",
        "first_BL = chunk_BL * options.window",
        "tests/layers/test_attention_options.py",
        "test_an_option_of_attention_equals_the_plain_loop",
    ),
    Mutant(
        "attention_temperature_of_position",
        "moejax/layers/attention.py",
        "(position_BL + 1.0)",
        "(position_BL + 0.0)",
        "tests/layers/test_attention_options.py",
        "test_an_option_of_attention_equals_the_plain_loop",
    ),
    Mutant(
        "rope_yarn_bounds_both_rounded_down",
        "moejax/layers/rope.py",
        "float(math.ceil(last))",
        "float(math.floor(last))",
        "tests/layers/test_attention_options.py",
        "test_an_option_of_attention_equals_the_plain_loop",
    ),
    Mutant(
        "rope_long_factors_never",
        "moejax/options.py",
        "self.long_factors if self.long else self.short_factors",
        "self.short_factors",
        "tests/layers/test_attention_options.py",
        "test_an_option_of_attention_equals_the_plain_loop",
    ),
    Mutant(
        "stack_without_residual_scale",
        "moejax/models/stack.py",
        "return y_BLD if self.residual_scale == 1.0 else y_BLD * self.residual_scale",
        "return y_BLD",
        "tests/models/test_stack_options.py",
        "test_a_models_options_change_what_is_added_to_the_residual_stream",
    ),
    Mutant(
        "stack_cap_before_scale",
        "moejax/tasks/language/model.py",
        "logits *= text.logit_scale",
        "logits *= 1.0",
        "tests/models/test_stack_options.py",
        "test_a_models_options_change_what_is_added_to_the_residual_stream",
    ),
    Mutant(
        "stack_global_layers_one_early",
        "moejax/options.py",
        "if not self.global_every or (layer + 1) % self.global_every:",
        "if not self.global_every or layer % self.global_every:",
        "tests/models/test_stack_options.py",
        "test_every_third_layer_of_the_model_has_no_window_and_no_rotation",
    ),
    Mutant(
        "experts_bias_of_dropped_pairs",
        "moejax/layers/moe.py",
        "weight_GTK = jnp.where(kept_GTK, routing.weight_GTK, 0.0)",
        "weight_GTK = routing.weight_GTK",
        "tests/layers/test_expert_options.py",
        "test_every_transport_adds_the_biases_of_the_pairs_that_arrive",
    ),
    Mutant(
        "experts_gate_not_clamped",
        "moejax/experts.py",
        "gate, up = jnp.minimum(gate, CLAMP), jnp.clip",
        "gate, up = gate, jnp.clip",
        "tests/layers/test_expert_options.py",
        "test_every_transport_adds_the_biases_of_the_pairs_that_arrive",
    ),
    Mutant(
        "experts_weighed_twice",
        "moejax/layers/moe.py",
        "(weight_GTK > 0).astype(weight_GTK.dtype)",
        "weight_GTK",
        "tests/layers/test_expert_options.py",
        "test_the_weight_is_a_factor_of_the_input_where_options_say_so",
    ),
    Mutant(
        "parameters_biases_of_heads_are_matrices",
        "moejax/train/parameters.py",
        ' or self.stem.endswith("_bias")',
        "",
        "tests/train/test_parameters.py",
        "test_every_parameter_of_every_task_has_the_properties_of_its_kind",
    ),
    Mutant(
        "loss_free_softplus_without_root",
        "moejax/gating/loss_free.py",
        "return 0.5 * jnp.where",
        "return 1.0 * jnp.where",
        "tests/gating/test_loss_free.py",
        "test_experts_and_weights_equal_the_published_ones",
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
    """Outcome of a test run: pytest's exit status, the failed tests, and the output."""

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
    """True if the mutant's test fails with it; the tree is restored afterwards.

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
