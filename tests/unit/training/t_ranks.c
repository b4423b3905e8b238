/* t_ranks.c: what launchers say in the environment. The truth: their manuals (torchrun, Open MPI, MPICH, Slurm). */
#include "training/ranks.h"
#include "suite.h"

#include <string.h>

struct variable {
  const char *name, *value;
};

static const char *get(void *arg, const char *name) {
  for (const struct variable *v = arg; v->name; v++)
    if (strcmp(v->name, name) == 0) return v->value;
  return NULL;
}

static struct us_ranks discover(struct variable *environment) {
  struct us_err err = {0};
  struct us_ranks ranks;
  ck_assert_msg(us_ranks_discover(get, environment, &ranks, &err) == US_OK, "%s", err.message);
  return ranks;
}

static void refuse(struct variable *environment, const char *expected) {
  struct us_err err = {0};
  struct us_ranks ranks;
  ck_assert_int_eq(us_ranks_discover(get, environment, &ranks, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, expected) != NULL, "%s", err.message);
}

START_TEST(without_a_launcher_there_is_one_process) {
  struct us_ranks ranks = discover((struct variable[]){{NULL, NULL}});
  ck_assert_uint_eq(ranks.process, 0);
  ck_assert_uint_eq(ranks.processes, 1);
  ck_assert_ptr_null(ranks.launcher);
}
END_TEST

START_TEST(torchrun_names_process_host_and_port) {
  struct variable environment[] = {{"RANK", "5"},
                                   {"WORLD_SIZE", "8"},
                                   {"LOCAL_RANK", "1"},
                                   {"LOCAL_WORLD_SIZE", "4"},
                                   {"MASTER_ADDR", "node7"},
                                   {"MASTER_PORT", "4000"},
                                   {NULL, NULL},
                                   {NULL, NULL}};
  struct us_ranks ranks = discover(environment);
  ck_assert_uint_eq(ranks.process, 5);
  ck_assert_uint_eq(ranks.processes, 8);
  ck_assert_uint_eq(ranks.local, 1);
  ck_assert_uint_eq(ranks.local_processes, 4);
  ck_assert_str_eq(ranks.address, "node7");
  ck_assert_uint_eq(ranks.port, 4000);
  environment[6] = (struct variable){"TORCHELASTIC_USE_AGENT_STORE", "True"}; /* its store has the port */
  ck_assert_uint_eq(discover(environment).port, 4001);
}
END_TEST

START_TEST(mpirun_on_one_host_meets_there) {
  struct us_ranks ranks = discover((struct variable[]){{"OMPI_COMM_WORLD_RANK", "2"},
                                                       {"OMPI_COMM_WORLD_SIZE", "4"},
                                                       {"OMPI_COMM_WORLD_LOCAL_RANK", "2"},
                                                       {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                                                       {NULL, NULL}});
  ck_assert_str_eq(ranks.launcher, "mpirun");
  ck_assert_uint_eq(ranks.local, 2);
  ck_assert_str_eq(ranks.address, "127.0.0.1");
}
END_TEST

START_TEST(srun_meets_on_the_first_node_of_the_step) {
  struct variable environment[] = {{"SLURM_PROCID", "9"},
                                   {"SLURM_STEP_NUM_TASKS", "16"},
                                   {"SLURM_LOCALID", "1"},
                                   {"SLURM_STEP_TASKS_PER_NODE", "8(x2)"},
                                   {"SLURM_STEP_NODELIST", "gpu[03-04]"},
                                   {"SLURM_JOB_ID", "123"},
                                   {NULL, NULL}};
  struct us_ranks ranks = discover(environment);
  ck_assert_str_eq(ranks.launcher, "srun");
  ck_assert_uint_eq(ranks.process, 9);
  ck_assert_uint_eq(ranks.local_processes, 8);
  ck_assert_str_eq(ranks.address, "gpu03");
  uint16_t port = ranks.port;
  environment[5].value = "124"; /* another job on the same host */
  ck_assert_uint_ne(discover(environment).port, port);
}
END_TEST

/* Slurm 22.05, two nodes of two tasks: srun --mpi=pmi2. */
START_TEST(sruns_own_pmi_leaves_the_hosts_to_slurm) {
  struct variable environment[] = {{"PMI_RANK", "2"},
                                   {"PMI_SIZE", "4"},
                                   {"SLURM_PROCID", "2"},
                                   {"SLURM_STEP_NUM_TASKS", "4"},
                                   {"SLURM_LOCALID", "0"},
                                   {"SLURM_STEP_TASKS_PER_NODE", "2(x2)"},
                                   {"SLURM_STEP_NODELIST", "n[1-2]"},
                                   {NULL, NULL}};
  struct us_ranks ranks = discover(environment);
  ck_assert_str_eq(ranks.launcher, "srun");
  ck_assert_uint_eq(ranks.process, 2);
  ck_assert_uint_eq(ranks.local, 0);
  ck_assert_uint_eq(ranks.local_processes, 2);
  ck_assert_str_eq(ranks.address, "n1");
}
END_TEST

/* MPICH 4.0 in a batch script: Slurm's numbers are those of the proxies, one a node. */
START_TEST(mpiexec_in_a_slurm_job_has_its_own_numbers) {
  struct us_ranks ranks = discover((struct variable[]){{"PMI_RANK", "3"},
                                                       {"PMI_SIZE", "4"},
                                                       {"MPI_LOCALRANKID", "1"},
                                                       {"MPI_LOCALNRANKS", "2"},
                                                       {"SLURM_PROCID", "1"},
                                                       {"SLURM_STEP_NUM_TASKS", "2"},
                                                       {"SLURM_LOCALID", "0"},
                                                       {"SLURM_STEP_NODELIST", "n[1-2]"},
                                                       {"SLURM_JOB_NODELIST", "n[1-2]"},
                                                       {NULL, NULL}});
  ck_assert_str_eq(ranks.launcher, "mpiexec");
  ck_assert_uint_eq(ranks.process, 3);
  ck_assert_uint_eq(ranks.local, 1);
  ck_assert_uint_eq(ranks.local_processes, 2);
  ck_assert_str_eq(ranks.address, "n1");
}
END_TEST

START_TEST(steps_of_one_job_do_not_share_a_port) {
  struct variable environment[] = {{"SLURM_PROCID", "0"},
                                   {"SLURM_STEP_NUM_TASKS", "2"},
                                   {"SLURM_LOCALID", "0"},
                                   {"SLURM_STEP_TASKS_PER_NODE", "2"},
                                   {"SLURM_JOB_ID", "1234"},
                                   {"SLURM_STEP_ID", "0"},
                                   {NULL, NULL}};
  uint16_t port = discover(environment).port;
  environment[5].value = "1";
  ck_assert_uint_ne(discover(environment).port, port);
  environment[4].value = "123", environment[5].value = "40"; /* 1234, 0 without anything between */
  ck_assert_uint_ne(discover(environment).port, port);
}
END_TEST

START_TEST(nodes_of_a_step_have_as_many_tasks_as_slurm_says) {
  static const struct {
    const char *list, *node;
    uint32_t tasks;
  } cases[] = {{"2,1", "0", 2},     {"2,1", "1", 1},       {"8(x2),4", "1", 8},
               {"8(x2),4", "2", 4}, {"1,3(x2),2", "3", 2}, {"1,3(x2),2", "2", 3}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    struct us_ranks ranks = discover((struct variable[]){{"SLURM_PROCID", "5"},
                                                         {"SLURM_STEP_NUM_TASKS", "20"},
                                                         {"SLURM_LOCALID", "0"},
                                                         {"SLURM_STEP_TASKS_PER_NODE", cases[i].list},
                                                         {"SLURM_NODEID", cases[i].node},
                                                         {"SLURM_STEP_NODELIST", "n[1-4]"},
                                                         {NULL, NULL}});
    ck_assert_msg(ranks.local_processes == cases[i].tasks, "%s: node %s: %u", cases[i].list, cases[i].node,
                  ranks.local_processes);
  }
}
END_TEST

/* Open MPI 4.1 in a batch script: its host is in no step, the others are in one of which it is no part. */
START_TEST(mpirun_in_a_batch_script_meets_on_the_first_node_of_the_job) {
  struct variable first[] = {{"OMPI_COMM_WORLD_RANK", "0"},       {"OMPI_COMM_WORLD_SIZE", "4"},
                             {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                             {"PMIX_NAMESPACE", "1929773057"},    {"SLURM_JOB_ID", "11"},
                             {"SLURM_JOB_NODELIST", "n[1-2]"},    {NULL, NULL}};
  struct variable third[] = {{"OMPI_COMM_WORLD_RANK", "2"},       {"OMPI_COMM_WORLD_SIZE", "4"},
                             {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                             {"PMIX_NAMESPACE", "1929773057"},    {"SLURM_JOB_ID", "11"},
                             {"SLURM_JOB_NODELIST", "n[1-2]"},    {"SLURM_STEP_ID", "0"},
                             {"SLURM_STEP_NODELIST", "n2"},       {NULL, NULL}};
  struct us_ranks a = discover(first), b = discover(third);
  ck_assert_str_eq(a.address, "n1");
  ck_assert_str_eq(b.address, "n1");
  ck_assert_uint_eq(a.port, b.port);
  first[4].value = "1929773058"; /* a second mpirun in the same job */
  ck_assert_uint_ne(discover(first).port, b.port);
}
END_TEST

START_TEST(a_batch_script_without_srun_is_one_process) {
  struct us_ranks ranks =
      discover((struct variable[]){{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "16"}, {NULL, NULL}});
  ck_assert_uint_eq(ranks.processes, 1);
}
END_TEST

START_TEST(a_file_takes_the_place_of_an_address) {
  struct us_ranks ranks = discover((struct variable[]){{"PMI_RANK", "1"},
                                                       {"PMI_SIZE", "2"},
                                                       {"MPI_LOCALRANKID", "0"},
                                                       {"MPI_LOCALNRANKS", "1"},
                                                       {"US_RENDEZVOUS", "/shared/run.meet"},
                                                       {NULL, NULL}});
  ck_assert_str_eq(ranks.launcher, "mpiexec");
  ck_assert_str_eq(ranks.file, "/shared/run.meet");
  ck_assert_str_eq(ranks.address, "");
}
END_TEST

START_TEST(contradictions_are_told) {
  refuse((struct variable[]){{"RANK", "0"}, {NULL, NULL}}, "RANK is set without WORLD_SIZE");
  refuse((struct variable[]){{"WORLD_SIZE", "2"}, {NULL, NULL}}, "WORLD_SIZE is set without RANK");
  refuse((struct variable[]){{"RANK", "2"}, {"WORLD_SIZE", "2"}, {NULL, NULL}},
         "RANK is 2, but WORLD_SIZE 2");
  refuse((struct variable[]){{"RANK", "two"}, {"WORLD_SIZE", "2"}, {NULL, NULL}}, "RANK is 'two'");
  refuse((struct variable[]){{"RANK", "-1"}, {"WORLD_SIZE", "2"}, {NULL, NULL}}, "RANK is '-1'");
  refuse((struct variable[]){{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "70000"}, {NULL, NULL}},
         "MASTER_PORT is '70000'");
  refuse((struct variable[]){{"OMPI_COMM_WORLD_RANK", "0"},
                             {"OMPI_COMM_WORLD_SIZE", "4"},
                             {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                             {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                             {NULL, NULL}},
         "set MASTER_ADDR");
}
END_TEST

START_TEST(local_processes_divide_the_gpus_in_sight) {
  struct us_err err = {0};
  struct us_ranks ranks = {.process = 3, .processes = 4, .local = 3, .local_processes = 4};
  uint32_t first = 9;
  ck_assert_int_eq(us_ranks_first_gpu(&ranks, 8, 2, &first, &err), US_OK);
  ck_assert_uint_eq(first, 6);
  ck_assert_int_eq(us_ranks_first_gpu(&ranks, 2, 2, &first, &err), US_OK); /* only its own are shown */
  ck_assert_uint_eq(first, 0);
  ck_assert_int_eq(us_ranks_first_gpu(&ranks, 6, 2, &first, &err), US_ERR_DEVICE);
  ck_assert_str_eq(err.message, "4 processes of 2 GPUs on this host; it has 6");
  ck_assert_int_eq(us_ranks_first_gpu(&ranks, 1, 2, &first, &err), US_ERR_DEVICE);
  ck_assert_str_eq(err.message, "2 GPUs asked for; there is 1");
}
END_TEST

START_TEST(the_first_host_of_a_node_list) {
  const struct {
    const char *list, *host;
  } cases[] = {{"gpu7", "gpu7"},
               {"a,b,c", "a"},
               {"gpu[03-07,9],login1", "gpu03"},
               {"rack[2,4]-node,x", "rack2-node"},
               {"", ""}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char host[256];
    us_ranks_first_host(cases[i].list, host);
    ck_assert_str_eq(host, cases[i].host);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("ranks");
  tcase_add_test(c, without_a_launcher_there_is_one_process);
  tcase_add_test(c, torchrun_names_process_host_and_port);
  tcase_add_test(c, mpirun_on_one_host_meets_there);
  tcase_add_test(c, srun_meets_on_the_first_node_of_the_step);
  tcase_add_test(c, sruns_own_pmi_leaves_the_hosts_to_slurm);
  tcase_add_test(c, mpiexec_in_a_slurm_job_has_its_own_numbers);
  tcase_add_test(c, steps_of_one_job_do_not_share_a_port);
  tcase_add_test(c, nodes_of_a_step_have_as_many_tasks_as_slurm_says);
  tcase_add_test(c, mpirun_in_a_batch_script_meets_on_the_first_node_of_the_job);
  tcase_add_test(c, a_batch_script_without_srun_is_one_process);
  tcase_add_test(c, a_file_takes_the_place_of_an_address);
  tcase_add_test(c, contradictions_are_told);
  tcase_add_test(c, local_processes_divide_the_gpus_in_sight);
  tcase_add_test(c, the_first_host_of_a_node_list);
  return us_suite("ranks", c);
}

US_TEST_MAIN(make_suite)
