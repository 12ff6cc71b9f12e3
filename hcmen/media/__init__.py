"""What people say and show, as the features that models take. No torch; heavy imports stand inside functions."""
