"How nbgrader works here: `cd teaching && nbgrader generate_assignment session1`."
c = get_config()                                            # noqa: F821 (nbgrader provides it)
c.CourseDirectory.course_id = 'cycle_nb'
c.ClearSolutions.code_stub = {'python': '# YOUR CODE HERE\nraise NotImplementedError()'}
c.ExecutePreprocessor.timeout = 300                         # seconds a cell may take
c.ExecutePreprocessor.startup_timeout = 180
