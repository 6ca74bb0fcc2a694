"""What goes beside a wheel: bill of materials, licences, known vulnerabilities. `make release` runs it."""
