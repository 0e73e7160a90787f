"""Models on disk: fetched, listed, checked and removed by one manager, which everything else asks."""
