"""Where programs run: devices, their float64, and arrays that span processes."""
