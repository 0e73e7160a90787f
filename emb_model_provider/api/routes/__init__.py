"""One module for each topic. A route translates HTTP and delegates."""
