"""Every claim of agreement between the product and its independent reference, and the machinery to check it."""
