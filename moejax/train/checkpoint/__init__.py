"""Checkpoints with manifests and checksums; restoring the newest intact one."""
