"""What the integrations cost the apps that they are plugged into."""
