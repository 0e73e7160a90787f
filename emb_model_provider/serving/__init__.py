"""One model at work: tokenizing, batching, its threads and their faults, finishing vectors."""
