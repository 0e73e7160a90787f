"""Complete, verified files on disk: snapshots, manifests, journals, locks."""
