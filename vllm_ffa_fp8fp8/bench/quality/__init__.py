"""What a setting costs, end to end: next-token distributions beside the default backend's."""
