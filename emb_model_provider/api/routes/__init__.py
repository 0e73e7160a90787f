"""Routes, one module per topic. A route translates HTTP and delegates."""
