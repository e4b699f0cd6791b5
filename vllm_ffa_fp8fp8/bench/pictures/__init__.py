"""What was measured, as pictures: from JSON files to PNG and SVG."""
