"""Names of the node and edge types of an assignment graph."""

from __future__ import annotations

INSTANCE = "instance"
LABEL = "label"
NEAR = (INSTANCE, "near", INSTANCE)
RELATES = (LABEL, "relates", LABEL)
MATCHES = (INSTANCE, "matches", LABEL)
