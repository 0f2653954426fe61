"""Parts of scripts/bench_moe_layer.py."""
