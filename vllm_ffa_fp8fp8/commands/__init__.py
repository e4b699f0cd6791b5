"""What a person types: `ffa-fp8fp8 COMMAND`, a module each."""
