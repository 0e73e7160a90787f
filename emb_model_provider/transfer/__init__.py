"""From one hub to another: a repository is listed, planned, copied as a stream and verified."""
