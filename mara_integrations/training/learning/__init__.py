"""What fits a head to data: objectives, fitting, the actor-critic, its replay buffer, credit assignment."""
