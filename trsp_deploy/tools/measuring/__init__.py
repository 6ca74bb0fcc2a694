"""How samples are taken: replicates of fresh processes that take turns, and the machine meanwhile."""
