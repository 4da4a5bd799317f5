"""The published efficiency tables, the systems that they compare, and the report."""
