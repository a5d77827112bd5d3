"""What a test of custom rules is worth: how many broken rules it catches."""
