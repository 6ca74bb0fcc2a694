"""What both training stages share, what stage 2 trains and how, and the closed-form refit before it."""
