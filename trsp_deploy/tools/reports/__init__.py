"""What people and CI systems read of a run, a sweep or a baseline, as text and as pages, from the same records."""
