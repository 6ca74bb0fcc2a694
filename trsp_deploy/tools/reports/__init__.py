"""What people read: `report.md` and `report.html`, from the same records."""
