"""What a job needs of memory and disk, and what the machine has."""
