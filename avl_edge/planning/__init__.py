"""What a request will hold and take on this device."""
