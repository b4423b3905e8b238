/* train_rows.h: the parts of train_rows.cu. Each compares an operation with the CPU's and times it. */
#ifndef US_TESTS_GPU_TRAIN_ROWS_H
#define US_TESTS_GPU_TRAIN_ROWS_H

void train_rows_norm(void);  /* train_rows.cu */
void train_rows_loss(void);  /* train_rows_loss.cu */
void train_rows_quant(void); /* train_rows_quant.cu */
void train_rows_time(void);  /* train_rows_time.cu */

#endif
