"""One noun-verb command, `pilotfish`."""
